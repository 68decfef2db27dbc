"""Rows in the forms that files of conversations have, and what is wrong with some."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_ep.data.conversations import MalformedRow, conversation

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello!"}


def read(row: dict[str, Any]) -> Any:
    return conversation(row, "chats.jsonl:7")


def test_messages_and_sharegpt_mean_the_same() -> None:
    messages = read({"messages": [{"role": "system", "content": "Be brief."}, HI, HELLO]})
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    assert read({"conversations": turns, "system": "Be brief."}) == messages
    assert read({"conversations": [{"from": "system", "value": "Be brief."}, *turns]}) == messages
    assert messages.trained == [False, False, True]


def test_lists_may_be_json_text() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = {"messages": [HI, HELLO], "tools": tools}
    assert read({key: json.dumps(value) for key, value in row.items()}) == read(row)
    assert read({"messages": [HI, HELLO], "tools": [json.dumps(tools[0])]}) == read(row)
    assert read({"messages": [HI, HELLO], "tools": "[]"}).tools is None


@pytest.mark.parametrize(
    "call",
    [
        {"function": {"name": "add", "arguments": {"b": [1, None], "a": "\N{SNOWMAN}"}}},
        {"function": {"name": "add", "arguments": '{"b": [1, null], "a": "\N{SNOWMAN}"}'}},
        {"type": "function", "function": {"name": "add", "arguments": '{"b":[1,null],"a":"\\u2603"}'}},
        {"name": "add", "arguments": {"b": [1, None], "a": "\N{SNOWMAN}"}},
        {"name": "add", "parameters": {"b": [1, None], "a": "\N{SNOWMAN}"}},
    ],
)
def test_arguments_are_the_same_as_a_dict_and_as_text(call: dict[str, Any]) -> None:
    (message,) = read({"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}).messages
    arguments = message["tool_calls"][0]["function"]["arguments"]
    assert json.dumps(arguments) == '{"b": [1, null], "a": "\\u2603"}'  # in this order
    assert message["content"] == ""


def test_a_function_call_of_sharegpt_is_a_tool_call() -> None:
    turns = [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "4."},
    ]
    read_turns = read({"conversations": turns, "tools": '[{"name": "add"}]'})
    assert [message["role"] for message in read_turns.messages] == ["user", "assistant", "tool", "assistant"]
    assert read_turns.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2, "b": 2}}
    assert read_turns.trained == [False, True, False, True]
    assert read_turns.tools == [{"name": "add"}]


def test_parts_of_text_are_one_text_and_other_parts_are_refused() -> None:
    parts = [{"type": "text", "text": "Hel"}, "lo!"]
    assert read({"messages": [HI, {**HELLO, "content": parts}]}) == read({"messages": [HI, HELLO]})
    with pytest.raises(MalformedRow, match=r"chats.jsonl:7: messages\[0\]: content has parts of the type 'image'"):
        read({"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, HELLO]})


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_one_name_and_is_not_empty(key: str) -> None:
    assert read({"messages": [HI, {**HELLO, key: "Greet."}]}).messages[1] == {**HELLO, "reasoning_content": "Greet."}
    assert read({"messages": [HI, {**HELLO, key: ""}]}).messages[1] == HELLO


def test_a_message_says_whether_it_is_learnt() -> None:
    messages = [
        HI,
        {**HELLO, "train": False},
        HI,
        {**HELLO, "weight": 0},
        {**HI, "train": True},
        {**HELLO, "weight": 1},
    ]
    read_messages = read({"messages": messages})
    assert read_messages.trained == [False] * 5 + [True]
    assert read_messages.messages == [HI, HELLO] * 3  # templates do not see it
    with pytest.raises(MalformedRow, match=r"chats.jsonl:7: messages\[1\]: weight .*0 or 1, not 0.5"):
        read({"messages": [HI, {**HELLO, "weight": 0.5}]})


def test_of_prompt_and_completion_the_second_is_learnt() -> None:
    row = read({"prompt": [HI, HELLO, HI], "completion": [HELLO]})
    assert row.messages == [HI, HELLO, HI, HELLO]
    assert row.trained == [False, False, False, True]
    with pytest.raises(MalformedRow, match=r"'prompt' is a text: PromptCompletionDataModule"):
        read({"prompt": "Hi", "completion": "Hello!"})


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "Hi"}, r"the row has \['text'\] and no 'messages'"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": "Hi"}, "messages is a text, and not JSON"),
        ({"messages": ["Hi"]}, r"messages\[0\] must be a dict with 'role' and 'content', not 'Hi'"),
        ({"messages": [{"content": "Hi"}]}, r"messages\[0\] has the role None, which is none of system, developer"),
        ({"messages": [HI, {"role": "robot", "content": "Hello!"}]}, r"messages\[1\] has the role 'robot'"),
        ({"conversations": [{"from": "alien", "value": "Hi"}]}, r"conversations\[0\] has the role 'alien'"),
        ({"conversations": [{"from": ["human"], "value": "Hi"}]}, r"conversations\[0\] has the role \['human'\]"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
        ({"messages": [{"role": "user", "content": 7}]}, r"messages\[0\]: content must be a text"),
        ({"messages": [{"role": "user", "content": 0}]}, r"messages\[0\]: content must be a text.* not 0"),
        ({"messages": [{"role": "user", "content": [{"type": [], "text": "Hi"}]}]}, r"parts of the type \[\]"),
        (
            {"messages": [{**HI, "tool_calls": [{"name": "f"}]}]},
            r"tool calls are an assistant's",
        ),
        ({"messages": [{**HELLO, "tool_calls": {"name": "f"}}]}, r"tool_calls must be a list"),
        ({"messages": [{**HELLO, "tool_calls": [{"arguments": {}}]}]}, r"tool_calls\[0\] must have a name"),
        (
            {"messages": [{**HELLO, "tool_calls": [{"name": "f", "arguments": "{a: 1}"}]}]},
            "is a text, and not",
        ),
        ({"messages": [{**HELLO, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}, "arguments must be a dict"),
        ({"messages": [HI, HELLO], "tools": "add(a, b)"}, "tools is a text, and not JSON"),
        ({"messages": [HI, HELLO], "tools": [7]}, r"tools\[0\] must be a dict"),
    ],
)
def test_malformed_rows_are_refused_by_file_and_line(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(MalformedRow, match=f"^chats.jsonl:7: .*{problem}|^chats.jsonl:7: {problem}"):
        read(row)
