"""From a row of a source to a conversation: every way that rows are written in the field, brought to one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

ROLES = ("system", "developer", "user", "assistant", "tool")
"""What a message's role may be; templates render an unknown one as nothing, silently."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
_SHAREGPT = {  # the values of "from" in ShareGPT's form, and in what grew from it
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_SYSTEMS = ("system", "developer")
_NAMED = 10  # rows in an error


class MalformedRow(ValueError):
    """A row that says nothing that can be trained on; the message begins with its file and line."""


def refuse(found: Sequence[MalformedRow]) -> None:
    """Raises MalformedRow for rows of a user who has not said what becomes of such rows, if there are any."""
    if not found:
        return
    lines = [str(error) for error in found[:_NAMED]]
    if len(found) > _NAMED:
        lines.append(f"And {len(found) - _NAMED} more of the rows around them.")
    one = len(found) == 1
    lines.append(f"Mend the {'row' if one else 'rows'}; or `malformed: skip` leaves out such rows, and counts them.")
    raise MalformedRow((" " if one else "\n").join(lines)) from found[0]


def text_of(content: Any, place: str, role: str) -> str:
    """What a message says, as a text; ``place`` is what errors call it.

    Raises:
        MalformedRow: If it is anything else.
    """
    return _text(content, place)


ReadContent = Callable[[Any, str, str], Any]
"""Reads the content of a message, as `text_of` does."""


class Conversation(NamedTuple):
    """Messages as templates take them, whichever way they were written.

    Attributes:
        messages: Each has ``role`` and ``content`` (a string, maybe empty, or what another reader than `text_of` makes
            of it); an assistant's may have
            ``reasoning_content`` (not empty) and ``tool_calls``, whose ``arguments`` are dicts. Other keys are kept.
        trained: Of each message, whether it is to be learnt: an assistant's, unless the row says otherwise.
        tools: What the system offers, as it was written; None if nothing.
        where: File and line, or source and row.
    """

    messages: list[dict[str, Any]]
    trained: list[bool]
    tools: list[dict[str, Any]] | None
    where: str


def conversation(row: Mapping[str, Any], where: str, read: ReadContent = text_of) -> Conversation:
    """Read one row.

    Args:
        row: ``messages``, dicts of ``role`` and ``content``, or ``conversations``, dicts of ``from`` and ``value``,
            or ``prompt`` and ``completion``, of which only the second is learnt; beside them ``system`` and ``tools``,
            where there are any. Each may be JSON text.
        where: What messages call the row.
        read: Reads the contents of messages.

    Raises:
        MalformedRow: If it is no conversation.
    """
    tools, system = row.get("tools"), row.get("system")
    key = next((key for key in ("messages", "conversations") if row.get(key) is not None), None)
    if key is not None:
        return from_messages(row[key], tools, where, key, system, read)
    if row.get("prompt") is None or row.get("completion") is None:
        raise MalformedRow(
            f"{where}: the row has {sorted(row)} and no 'messages' (dicts of 'role' and 'content'), 'conversations' "
            "(dicts of 'from' and 'value'), or 'prompt' and 'completion' (lists of messages)."
        )
    if isinstance(row["prompt"], str) and not row["prompt"].lstrip().startswith("["):
        raise MalformedRow(f"{where}: 'prompt' is a text: PromptCompletionDataModule reads pairs of texts.")
    given = from_messages(row["prompt"], tools, where, "prompt", system, read)
    learnt = from_messages(row["completion"], None, where, "completion", None, read)
    trained = [False] * len(given.trained) + learnt.trained
    return given._replace(messages=given.messages + learnt.messages, trained=trained)


class Preference(NamedTuple):
    """Two conversations that begin alike; only what the assistant says behind that is learnt of each."""

    chosen: Conversation
    rejected: Conversation


def preference(row: Mapping[str, Any], where: str) -> Preference:
    """Read one row of preferences.

    Args:
        row: ``chosen`` and ``rejected``, conversations that begin alike or answers to ``prompt``, each of which may be
            a text in place of one message; beside them ``system`` and ``tools``, where there are any. ``prompt`` may be
            called ``conversations`` or ``messages``.
        where: What messages call the row.

    Raises:
        MalformedRow: If it is none, or the two have no assistant's turn of their own.
    """
    sides = [_messages(row.get(key), "assistant") for key in ("chosen", "rejected")]
    if not all(sides):
        raise MalformedRow(f"{where}: the row has {sorted(row)}, and a preference is 'chosen' and 'rejected'.")
    tools, system = row.get("tools"), row.get("system")
    key = next((key for key in ("prompt", "conversations", "messages") if row.get(key) is not None), "prompt")
    prompt = _messages(row.get(key), "user")
    asked = from_messages(prompt, None, where, key).messages if prompt else []
    chosen, rejected = (
        from_messages(side, tools, where, key) for side, key in zip(sides, ("chosen", "rejected"), strict=True)
    )
    answers = any(side.messages[0]["role"] == "assistant" for side in (chosen, rejected))
    chosen, rejected = (_behind(asked if answers else _missing(asked, side), side) for side in (chosen, rejected))
    if system:
        first = [{"role": "system", "content": _text(system, f"{where}: system")}]
        chosen, rejected = (_behind(first, side) for side in (chosen, rejected))
    both = zip(chosen.messages, rejected.messages, strict=False)
    shared = next((i for i, (one, other) in enumerate(both) if one != other), None)
    if shared is None:  # they are equal, or one goes on where the other ends
        shared = min(len(chosen.messages), len(rejected.messages))
    if chosen.messages == rejected.messages:
        return Preference(chosen, rejected)
    if shared == 0:
        raise MalformedRow(f"{where}: chosen and rejected have no message in common: add 'prompt' to the row.")
    pair = [
        side._replace(trained=[learnt and i >= shared for i, learnt in enumerate(side.trained)])
        for side in (chosen, rejected)
    ]
    for ended, key in zip(pair, ("chosen", "rejected"), strict=True):
        if not any(ended.trained):
            raise MalformedRow(f"{where}: {key} has no assistant's turn behind what the two have in common.")
    return Preference(*pair)


def _messages(written: Any, role: str) -> Any:
    """Messages, of which a text or a dict is one; none if nothing is there."""
    if written is None:
        return []
    if isinstance(written, str):
        try:
            read = json.loads(written)
        except json.JSONDecodeError:
            read = None
        if isinstance(read, Mapping) and not {"role", "from"}.isdisjoint(read):
            return [read]
        if isinstance(read, list) and read and all(isinstance(one, Mapping) for one in read):
            return read
        return [{"role": role, "content": written}]  # an answer may be JSON, or begin like it
    return [written] if isinstance(written, Mapping) else written


def _missing(asked: list[dict[str, Any]], side: Conversation) -> list[dict[str, Any]]:
    """What of a prompt belongs in front of a side: some files repeat all of it there, or all but the system's."""
    systems = next((i for i, message in enumerate(asked) if message["role"] not in _SYSTEMS), len(asked))
    for given in (asked[:0], asked[:systems]):
        rest = asked[len(given) :]
        if side.messages[: len(rest)] == rest and not (given and side.messages[0]["role"] in _SYSTEMS):
            return given
    # Behind an answer it goes on; otherwise it is a whole conversation, whose prompt was written differently.
    return asked if asked[-1]["role"] == "assistant" else []


def _behind(messages: list[dict[str, Any]], answer: Conversation) -> Conversation:
    """A conversation that goes on where others' messages, which are not learnt, end."""
    return answer._replace(messages=messages + answer.messages, trained=[False] * len(messages) + answer.trained)


def from_messages(
    written: Any, tools: Any, where: str, key: str = "messages", system: Any = None, read: ReadContent = text_of
) -> Conversation:
    """Read a list of messages, or JSON text of one.

    Args:
        written: The messages.
        tools: The list of tools, JSON text of it, or None.
        where: What error messages call the row.
        key: What they call the messages.
        system: A system prompt to go in front.
        read: Reads the contents of messages.

    Raises:
        MalformedRow: If these are no messages.
    """
    written = _parsed(written, where, key)
    if not isinstance(written, Sequence) or isinstance(written, str) or not written:
        raise MalformedRow(f"{where}: {key} must be a list of at least one message, not {_short(written)}.")
    messages, learnt = [], []
    if system:
        messages.append({"role": "system", "content": _text(system, f"{where}: system")})
        learnt.append(False)
    for index, one in enumerate(written):
        place = f"{where}: {key}[{index}]"
        if not isinstance(one, Mapping):
            raise MalformedRow(f"{place} must be a dict with 'role' and 'content', not {_short(one)}.")
        messages.append(_message(one, place, read))
        learnt.append(_trained(one, place) and messages[-1]["role"] == "assistant")
    return Conversation(messages, learnt, _tools(tools, where), where)


def _message(written: Mapping[str, Any], place: str, read: ReadContent) -> dict[str, Any]:
    # A key with None is one that Arrow has filled in, or an API that has nothing to say: templates ask for keys.
    message = {key: value for key, value in written.items() if value is not None and key not in ("train", "weight")}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        known = _SHAREGPT.get(speaker, speaker) if isinstance(speaker, str) else speaker
        message = {"role": known, "content": message.pop("value", None), **message}
        if speaker == "function_call":
            call = _parsed(message["content"], place, "value")
            message |= {"content": None, "tool_calls": call if isinstance(call, list) else [call]}
    role = message.get("role")
    if role not in ROLES:
        raise MalformedRow(f"{place} has the role {_short(role)}, which is none of {', '.join(ROLES)}.")
    reasoning = next((text for key in _REASONING if (text := message.pop(key, None))), None)
    message = {key: value for key, value in message.items() if key not in _REASONING}
    calls = _parsed(message.pop("tool_calls", None), place, "tool_calls")
    if role != "assistant" and (reasoning or calls):
        raise MalformedRow(f"{place}: reasoning and tool calls are an assistant's, and its role is {role!r}.")
    if message.get("content") is None and not (reasoning or calls) and role != "tool":
        raise MalformedRow(f"{place} has no content: give a text, '' if it is empty.")
    # Never missing or None: some templates write "None", others fail.
    content = message.get("content")
    message["content"] = read("" if content is None else content, f"{place}: content", role)
    if reasoning:
        message["reasoning_content"] = _text(reasoning, f"{place}: reasoning")
    if calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise MalformedRow(f"{place}: tool_calls must be a list, not {_short(calls)}.")
        message["tool_calls"] = [_call(call, f"{place}: tool_calls[{i}]") for i, call in enumerate(calls)]
    return message


def _text(content: Any, place: str) -> str:
    """Texts come as strings or in parts; many templates would write a list of parts as Python does."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, str | Mapping) for part in content):
        texts = [part if isinstance(part, str) else part.get("text") for part in content]
        kinds = {repr(part.get("type", "text")) for part in content if isinstance(part, Mapping)} - {repr("text")}
        if kinds:
            raise MalformedRow(f"{place} has parts of the type {', '.join(sorted(kinds))}; texts are read.")
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise MalformedRow(f"{place} must be a text, or a list of parts with 'text', not {_short(content)}.")


def _call(written: Any, place: str) -> dict[str, Any]:
    """As ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``, with an id where there is one."""
    function = written.get("function", written) if isinstance(written, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise MalformedRow(f"{place} must have a name and arguments, in 'function' or not, and is {_short(written)}.")
    arguments = _parsed(function.get("arguments", function.get("parameters")) or {}, place, "arguments")
    if not isinstance(arguments, Mapping):
        raise MalformedRow(f"{place}: arguments must be a dict, or JSON text of one, not {_short(arguments)}.")
    call = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    return {"id": written["id"], **call} if written.get("id") is not None else call


def _tools(written: Any, where: str) -> list[dict[str, Any]] | None:
    tools = _parsed(written, where, "tools")
    if not tools:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise MalformedRow(f"{where}: tools must be a list, or JSON text of one, not {_short(tools)}.")
    tools = [_parsed(tool, where, f"tools[{index}]") for index, tool in enumerate(tools)]
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise MalformedRow(f"{where}: tools[{index}] must be a dict with the schema, not {_short(tool)}.")
    return [dict(tool) for tool in tools]


def _trained(written: Mapping[str, Any], place: str) -> bool:
    """Whether a message is to be learnt: its ``train``, or ``weight`` as OpenAI's files have it."""
    for key in ("train", "weight"):
        if (value := written.get(key)) is not None:
            if value not in (0, 1):
                raise MalformedRow(f"{place}: {key} says whether a message is learnt: 0 or 1, not {_short(value)}.")
            return bool(value)
    return True


def _parsed(value: Any, where: str, key: str) -> Any:
    """What JSON text means; anything but a string is there already."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise MalformedRow(f"{where}: {key} is a text, and not JSON ({error}): {_short(value)}") from error
    if problem := half_of_a_character(parsed):
        raise MalformedRow(f"{where}: {key}: {problem}")
    return parsed


def half_of_a_character(value: Any) -> str | None:
    """What is wrong if a text in JSON was cut inside of a surrogate pair: tokenizers read none of it."""
    half = re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False))
    return f"a text has {half[0]!r}, which is half of a character. Take it out." if half else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
