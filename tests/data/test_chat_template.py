"""Which characters of a rendered conversation are learnt, by hand, for the templates of many families."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lightning_ep.data.chat_template import DIFFERENT, LOST_REASONING, LOST_TOOLS, UNPROMPTED, ChatTemplate
from lightning_ep.data.conversations import conversation
from lightning_ep.data.preparation import Samples
from lightning_ep.data.rendering import RendersConversations
from tests.data.chat_families import FAMILIES, chat_template, deepseek, family_tokenizer, stop_ids, template_text

SYSTEM = {"role": "system", "content": "Be brief."}
HI = {"role": "user", "content": "Hi"}
SUM = {"role": "user", "content": "2 + 2?"}
HELLO = {"role": "assistant", "content": "Hello!"}
FOUR = {"role": "assistant", "content": "4."}
THOUGHT_HELLO = {**HELLO, "reasoning_content": "A greeting."}
THOUGHT_FOUR = {**FOUR, "reasoning_content": "Add them."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 2}}]}
THOUGHT_CALL = {**CALL, "reasoning_content": "Use the tool."}
RESULT = {"role": "tool", "content": "4"}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
    }
]

NO_THOUGHT = "<think>\n\n</think>\n\n"
GPT_OSS_HELLO = (
    "<|channel|>analysis<|message|>A greeting.<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>"
)
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'


def samples_of(name: str, messages: list[dict[str, Any]], tools: Any = None, **settings: Any) -> Samples:
    split_turns = settings.pop("split_turns", False)
    length = settings.pop("sequence_length", 2048)
    template = chat_template(name, **settings)
    samples = Samples()
    renders = RendersConversations(family_tokenizer(name), template, length, split_turns)
    renders([conversation({"messages": messages, "tools": tools}, "chats.jsonl:1")], samples)
    return samples


def learnt_texts(tokenizer: PreTrainedTokenizerBase, samples: Samples) -> list[list[str]]:
    """Of every sample, the texts of its runs of supervised tokens."""
    found = []
    for ids, supervised in samples.samples:
        runs: list[list[int]] = []
        before = False
        for token, learnt in zip(ids, supervised, strict=True):
            if learnt and not before:
                runs.append([])
            if learnt:
                runs[-1].append(token)
            before = learnt
        found.append([tokenizer.decode(run) for run in runs])
    return found


def learnt(name: str, messages: list[dict[str, Any]], tools: Any = None, **settings: Any) -> list[str]:
    """What is learnt of a conversation that is one sample."""
    (texts,) = learnt_texts(family_tokenizer(name), samples_of(name, messages, tools, **settings))
    return texts


# ------------------------------------------------------------------------------------------------- one case, one row

CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], list[str]]] = {
    # Qwen3: thinking on; an answer without reasoning is generated with an empty think block
    "qwen3": ("qwen3", [HI, HELLO], {}, [NO_THOUGHT + "Hello!<|im_end|>"]),
    "qwen3 thinks": ("qwen3", [HI, THOUGHT_HELLO], {}, ["<think>\nA greeting.\n</think>\n\nHello!<|im_end|>"]),
    "qwen3 thinks in its content": (
        "qwen3",
        [HI, {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello!"}],
        {},
        ["<think>\nA greeting.\n</think>\n\nHello!<|im_end|>"],
    ),
    "qwen3 drops earlier thoughts": (
        "qwen3",
        [HI, THOUGHT_HELLO, SUM, THOUGHT_FOUR],
        {},
        ["<think>\nAdd them.\n</think>\n\n4.<|im_end|>"],
    ),
    "qwen3 with an empty answer": ("qwen3", [HI, {**HELLO, "content": ""}], {}, [NO_THOUGHT + "<|im_end|>"]),
    "qwen3 calls": (  # the template writes no think block before the result
        "qwen3",
        [SYSTEM, SUM, CALL, RESULT, FOUR],
        {"tools": TOOLS},
        [QWEN_CALL + "<|im_end|>", NO_THOUGHT + "4.<|im_end|>"],
    ),
    "qwen3 thinks and calls": (
        "qwen3",
        [SUM, THOUGHT_CALL, RESULT, THOUGHT_FOUR],
        {"tools": TOOLS},
        [
            f"<think>\nUse the tool.\n</think>\n\n{QWEN_CALL}<|im_end|>",
            "<think>\nAdd them.\n</think>\n\n4.<|im_end|>",
        ],
    ),
    # thinking off: the prompt supplies the empty think block
    "qwen3 without thinking": ("qwen3", [HI, HELLO], {"enable_thinking": False}, ["Hello!<|im_end|>"]),
    "qwen3 without thinking, an empty answer": (
        "qwen3",
        [HI, {**HELLO, "content": ""}],
        {"enable_thinking": False},
        ["<|im_end|>"],
    ),
    "qwen3 without thinking calls": (
        "qwen3",
        [SUM, CALL, RESULT, FOUR],
        {"tools": TOOLS, "enable_thinking": False},
        [QWEN_CALL + "<|im_end|>", "4.<|im_end|>"],
    ),
    "qwen3 that was told not to think is not taught to": (
        "qwen3",
        [HI, THOUGHT_HELLO],
        {"enable_thinking": False},
        ["Hello!<|im_end|>"],
    ),
    "qwen3 that was told not to think is not taught to by what is in the answer": (
        "qwen3",
        [HI, {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello!"}],
        {"enable_thinking": False},
        ["Hello!<|im_end|>"],
    ),
    "qwen3-instruct": ("qwen3_instruct_2507", [HI, HELLO, SUM, FOUR], {}, ["Hello!<|im_end|>", "4.<|im_end|>"]),
    "qwen3.5, whose prompt opens the thoughts": (
        "qwen3_5_think",
        [HI, THOUGHT_HELLO],
        {},
        ["A greeting.\n</think>\n\nHello!<|im_end|>"],
    ),
    "qwen2.5 calls": (
        "qwen2_5",
        [SUM, CALL, RESULT, FOUR],
        {"tools": TOOLS},
        [QWEN_CALL + "<|im_end|>", "4.<|im_end|>"],
    ),
    # markers of a training template, which keeps all thoughts
    "qwen3 markers": (
        "qwen3_training",
        [HI, THOUGHT_HELLO, SUM, FOUR],
        {},
        ["<think>\nA greeting.\n</think>\n\nHello!<|im_end|>", NO_THOUGHT + "4.<|im_end|>"],
    ),
    "qwen3 markers enclose what the prompt supplies": (
        "qwen3_training",
        [HI, HELLO, SUM, FOUR],
        {"enable_thinking": False},
        ["Hello!<|im_end|>", "4.<|im_end|>"],
    ),
    "gpt-oss markers enclose the header": (
        "gptoss_training",
        [HI, THOUGHT_HELLO],
        {},
        [GPT_OSS_HELLO],
    ),
    "deepseek markers enclose the header": (
        "deepseekv3_training",
        [HI, HELLO],
        {},
        [deepseek("Hello!<|end_of_sentence|>")],
    ),
    # Llama-3 trims
    "llama3": ("llama3", [SYSTEM, HI, HELLO, SUM, FOUR], {}, ["Hello!<|eot_id|>", "4.<|eot_id|>"]),
    "llama3 trims": ("llama3", [HI, {**HELLO, "content": " \n Hello! \n"}], {}, ["Hello!<|eot_id|>"]),
    "llama3 with an empty answer": ("llama3", [HI, {**HELLO, "content": ""}], {}, ["<|eot_id|>"]),
    "llama3.1 calls": (
        "llama3_1",
        [SUM, CALL, RESULT, FOUR],
        {"tools": TOOLS},
        ['{"name": "add", "parameters": {"a": 2, "b": 2}}<|eot_id|>', "4.<|eot_id|>"],
    ),
    # gpt-oss: the channel is generated, too; <|return|> ends the last turn only
    "gpt-oss": ("gptoss", [HI, HELLO, SUM, FOUR], {}, ["<|channel|>final<|message|>4.<|return|>"]),
    "gpt-oss thinks": (
        "gptoss",
        [HI, THOUGHT_HELLO],
        {},
        [GPT_OSS_HELLO],
    ),
    "gpt-oss calls": (
        "gptoss",
        [SUM, CALL, RESULT, FOUR],
        {"tools": TOOLS},
        [
            ' to=functions.add<|channel|>commentary json<|message|>{"a": 2, "b": 2}<|call|>',
            "<|channel|>final<|message|>4.<|return|>",
        ],
    ),
    # GLM-4-MoE ends a turn with what begins the next message
    "glm": (
        "glm4moe",
        [HI, HELLO, SUM, FOUR],
        {},
        ["\n<think></think>\nHello!<|user|>", "\n<think></think>\n4.<|user|>"],
    ),
    "glm thinks": ("glm4moe", [HI, THOUGHT_HELLO], {}, ["\n<think>A greeting.</think>\nHello!<|user|>"]),
    "glm calls": (
        "glm4moe",
        [SUM, THOUGHT_CALL, RESULT, FOUR],
        {"tools": TOOLS},
        [
            "\n<think>Use the tool.</think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n"
            "<arg_key>b</arg_key>\n<arg_value>2</arg_value>\n</tool_call><|observation|>",
            "\n<think></think>\n4.<|user|>",
        ],
    ),
    "glm without thinking": ("glm4moe", [HI, HELLO], {"enable_thinking": False}, ["\nHello!<|user|>"]),
    # DeepSeek-V3 drops all reasoning, and asks with <think>
    "deepseek": ("deepseekv3", [SYSTEM, HI, HELLO, SUM, FOUR], {}, [deepseek("4.<|end_of_sentence|>")]),
    "deepseek's answer may begin like its prompt": (
        "deepseekv3",
        [HI, {**HELLO, "content": "<thanks>"}],
        {},
        [deepseek("<thanks><|end_of_sentence|>")],
    ),
    "deepseek calls": (
        "deepseekv3",
        [SUM, CALL, RESULT, FOUR],
        {"tools": TOOLS},
        [
            deepseek(
                "<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>add\n```json\n"
                '{"a": 2, "b": 2}\n```<|tool_call_end|><|tool_calls_end|><|end_of_sentence|>'
            ),
            deepseek("4.<|end_of_sentence|>"),
        ],
    ),
    "gemma": ("gemma3", [HI, HELLO, SUM, FOUR], {}, ["Hello!<end_of_turn>", "4.<end_of_turn>"]),
    "phi, which ends a conversation once more": ("phi3", [HI, HELLO, SUM, FOUR], {}, ["Hello!<|end|>", "4.<|end|>"]),
    "mixtral": ("mixtral", [HI, HELLO, SUM, FOUR], {}, [" Hello!</s>", " 4.</s>"]),
}


@pytest.mark.parametrize("case", CASES)
def test_learnt_is(case: str) -> None:
    name, messages, settings, expected = CASES[case]
    assert learnt(name, messages, **settings) == expected


def test_what_text_stands_around_the_learnt_makes_no_difference() -> None:
    # the question quotes the template, and the answer the question: places are not searched for
    quoting = "<|im_start|>assistant\nHello!<|im_end|>\n"
    asked = [{"role": "user", "content": quoting}, {"role": "assistant", "content": f"{quoting}Hello!"}]
    assert learnt("qwen3_instruct_2507", [*asked, HI, HELLO]) == [f"{quoting}Hello!<|im_end|>", "Hello!<|im_end|>"]


# --------------------------------------------------------------------------------------------------- turns on their own


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qwen3",
            ["<think>\nA greeting.\n</think>\n\nHello!<|im_end|>", "<think>\nAdd them.\n</think>\n\n4.<|im_end|>"],
        ),
        (
            "gptoss",
            [
                GPT_OSS_HELLO,
                GPT_OSS_HELLO.replace("A greeting.", "Add them.").replace("Hello!", "4."),
            ],
        ),
        ("glm4moe", ["\n<think>A greeting.</think>\nHello!<|user|>", "\n<think>Add them.</think>\n4.<|user|>"]),
    ],
)
def test_split_turns_are_learnt_with_their_reasoning(name: str, expected: list[str]) -> None:
    samples = samples_of(name, [SYSTEM, HI, THOUGHT_HELLO, SUM, THOUGHT_FOUR], split_turns=True)
    assert learnt_texts(family_tokenizer(name), samples) == [[one] for one in expected]
    assert not samples.notes


def test_a_split_turn_is_given_what_the_model_would_be() -> None:
    tokenizer = family_tokenizer("qwen3")
    samples = samples_of("qwen3", [HI, THOUGHT_HELLO, SUM, THOUGHT_FOUR], split_turns=True)
    for turn, (ids, supervised) in zip((1, 3), samples.samples, strict=True):
        asked = tokenizer.apply_chat_template(
            [HI, THOUGHT_HELLO, SUM, THOUGHT_FOUR][:turn], add_generation_prompt=True, return_dict=False
        )
        assert list(ids[: supervised.index(True)]) == asked


def test_turns_that_are_rendered_otherwise_are_counted() -> None:
    assert samples_of("qwen3", [HI, HELLO, SUM, FOUR, HI, HELLO]).notes == {DIFFERENT: 2}
    assert samples_of("qwen3_instruct_2507", [HI, HELLO, SUM, FOUR]).notes == Counter()


# ------------------------------------------------------------------------------------------------------ what is counted


def test_reasoning_and_tools_that_a_template_leaves_out_are_counted() -> None:
    assert samples_of("llama3", [HI, THOUGHT_HELLO], TOOLS).notes == {LOST_REASONING: 1, LOST_TOOLS: 1}
    assert samples_of("qwen3", [HI, THOUGHT_HELLO], TOOLS).notes == Counter()
    # gpt-oss keeps the reasoning of a call only until the answer
    assert samples_of("gptoss", [SUM, THOUGHT_CALL, RESULT, FOUR], TOOLS).notes == {LOST_REASONING: 1}


def test_an_answer_to_nothing_is_not_learnt() -> None:
    samples = samples_of("qwen3_instruct_2507", [HELLO, SUM, FOUR])
    assert learnt_texts(family_tokenizer("qwen3"), samples) == [["4.<|im_end|>"]]
    assert samples.notes == {UNPROMPTED: 1}


def test_calls_that_a_template_leaves_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chats.jsonl:1: the chat template leaves out 1 of the 1 tool calls"):
        samples_of("llama3", [SUM, CALL, RESULT, FOUR], TOOLS)
    two = {**CALL, "tool_calls": [*CALL["tool_calls"], {"name": "add", "arguments": {"a": 1}}]}
    with pytest.raises(ValueError, match=r"chats.jsonl:1: the chat template leaves out 1 of the 2 tool calls"):
        samples_of("gptoss", [SUM, two, RESULT, FOUR], TOOLS)
    assert len(learnt("qwen3", [SUM, two, RESULT, RESULT, FOUR], TOOLS)) == 2


def test_what_a_template_refuses_is_told_with_file_and_line() -> None:
    with pytest.raises(ValueError, match=r"chats.jsonl:1: the chat template cannot render it: Conversation roles must"):
        samples_of("gemma3", [HI, HI, HELLO])


# ------------------------------------------------------------------------------------------------ against transformers


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_apply_chat_template(name: str) -> None:
    tokenizer = family_tokenizer(name)
    (sample,) = samples_of(name, [HI, HELLO, SUM, FOUR]).samples
    expected = tokenizer.apply_chat_template([HI, HELLO, SUM, FOUR], return_dict=False)
    ending = list(sample.input_ids)[len(expected) :]  # GLM-4 alone does not end the last turn itself
    assert list(sample.input_ids)[: len(expected)] == expected
    assert tokenizer.decode(ending) == ("<|user|>" if name == "glm4moe" else "")
    if tokenizer.bos_token_id is not None and "bos_token" in tokenizer.chat_template:
        assert list(sample.input_ids).count(tokenizer.bos_token_id) == 1
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id, "the tokenizer would add a second one"


@pytest.mark.parametrize("name", ["qwen3_training", "llama3_training"])
def test_markers_mean_what_they_mean_to_transformers(name: str) -> None:
    tokenizer = family_tokenizer(name)
    messages = [SYSTEM, HI, HELLO, SUM, {**FOUR, "content": "4 \N{DIGIT FOUR} \N{SNOWMAN}"}]
    (sample,) = samples_of(name, messages).samples
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    differ = [
        tokenizer.decode(token)
        for token, ours, theirs in zip(sample.input_ids, sample.supervised, encoded["assistant_masks"], strict=True)
        if ours != bool(theirs)
    ]
    assert set(differ) <= {"\n"}  # Qwen3's markers enclose what follows <|im_end|>, which nobody generates
    assert any(sample.supervised)


@pytest.mark.parametrize("chat", [[SYSTEM, HI, HELLO, SUM, FOUR], [HI, THOUGHT_HELLO], [SUM, CALL, RESULT, FOUR]])
@pytest.mark.parametrize(
    ("name", "header"),  # what the judge's markers enclose of the prompt
    [
        ("qwen3", ""),
        ("qwen3_instruct_2507", ""),
        ("qwen2_5", "\n"),
        ("llama3", ""),
        ("glm4moe", ""),
        ("gemma3", ""),
        ("gptoss", "<|start|>assistant"),
        ("deepseekv3", deepseek("<|Assistant|>")),
    ],
)
def test_turns_on_their_own_are_what_markers_by_other_hands_enclose(
    name: str, header: str, chat: list[dict[str, Any]]
) -> None:
    if CALL in chat and name in ("llama3", "gemma3", "deepseekv3"):
        return  # no calls of tools; DeepSeek's judge takes the end of what a tool returns for generated
    tokenizer = family_tokenizer(name)
    samples = samples_of(name, chat, split_turns=True)
    theirs = []
    messages = conversation({"messages": chat}, "").messages
    for end in (index + 1 for index, message in enumerate(chat) if message["role"] == "assistant"):
        encoded = tokenizer.apply_chat_template(
            messages[:end], chat_template=template_text(f"{name}_training"), return_assistant_tokens_mask=True
        )
        mask = encoded["assistant_masks"]
        stop = len(mask) - mask[::-1].index(1)
        begin = max((index + 1 for index, token in enumerate(mask[:stop]) if not token), default=0)
        theirs.append([tokenizer.decode(encoded["input_ids"][begin:stop]).rstrip("\n")])
    assert [[f"{header}{text}" for text in texts] for texts in learnt_texts(tokenizer, samples)] == theirs


def test_several_markers_in_a_turn_belong_to_it() -> None:
    # Phi-3's training template marks the end of the whole conversation on its own
    chat = [HI, {**HELLO, "train": False}, SUM, FOUR]
    assert learnt("phi3_training", [HI, HELLO, SUM, FOUR])[:2] == ["Hello!<|end|>", "4.<|end|>"]
    assert learnt("phi3_training", chat)[0] == "4.<|end|>"
    samples = samples_of("phi3_training", [HI, HELLO, SUM, FOUR], split_turns=True)
    assert [texts[0] for texts in learnt_texts(family_tokenizer("phi3"), samples)] == ["Hello!<|end|>", "4.<|end|>"]


# -------------------------------------------------------------------------------------------------------------- the end


def test_an_end_at_which_the_model_does_not_stop_is_refused() -> None:
    tokenizer = family_tokenizer("qwen3")
    end, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    with pytest.raises(ValueError, match=rf"'<\|im_end\|>' \({end}\).*does not stop.*\[{text_end}\].*go on") as raised:
        ChatTemplate(tokenizer, tokenizer.chat_template, {}, [text_end])  # as base models have it
    assert f'"eos_token_id": [{text_end}, {end}]' in str(raised.value)


def test_a_template_that_ends_turns_with_nothing_is_refused() -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    with pytest.raises(ValueError, match=r"no special token behind an assistant's answer.*eos_token"):
        ChatTemplate(family_tokenizer("qwen3"), template, {}, stop_ids("qwen3"))


def test_a_template_that_cannot_render_a_question_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot render it: no chats"):
        ChatTemplate(family_tokenizer("qwen3"), "{{ raise_exception('no chats') }}", {}, stop_ids("qwen3"))


def test_what_only_the_prompt_has_is_known() -> None:
    assert chat_template("deepseekv3").unwritten == "<think>\n"
    assert chat_template("qwen3", enable_thinking=False).unwritten == ""


def test_the_templates_are_those_of_the_wheel() -> None:
    assert "multi_step_tool" in template_text("qwen3")
