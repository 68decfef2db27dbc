"""What an assistant wrote in a rendered conversation: character ranges, found by rendering and never by searching.

A conversation is rendered as a whole. Where the assistant's turn ``i`` is in that text is told by two more renderings:
of the messages before it with a generation prompt, after which generation begins, and of the messages up to it. Where
both begin the whole text, the turn stands there as it was generated.

Templates that drop the reasoning of earlier turns (Qwen3, gpt-oss), or end the last turn differently, render earlier
turns differently from how they were generated, and what follows the last user's message sometimes too: Qwen3 leaves
out the empty think block of a tool call once its result has come. Such a turn is found by replacing what a message says
by a probe: what both renderings share, from the left and from the right, encloses it, and between two messages there
is nothing but the template's own text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_ep import transformers_adapter as adapter

Message = Mapping[str, Any]
Span = tuple[int, int]

_PROBE = "\ue000"  # private use: neither templates nor texts begin or end with it
_INLINE = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
_NAME = "a_function_of_nobody"
_TOOL = {
    "type": "function",
    "function": {"name": _NAME, "description": "", "parameters": {"type": "object", "properties": {}}},
}
_QUESTION: Message = {"role": "user", "content": "\ue001"}
_ANSWER: Message = {"role": "assistant", "content": "\ue002"}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "call00001", "function": {"name": _NAME, "arguments": {"a": "b"}}}],
}
_RESULT: Message = {"role": "tool", "content": "\ue003", "name": _NAME, "tool_call_id": "call00001"}

DIFFERENT = "assistant's turns not learnt, since the template renders them otherwise later (split_turns learns them)"
LOST_TOOLS = "conversations whose tools the template leaves out"
LOST_REASONING = "assistant's turns learnt without their reasoning, which the template or its prompt leaves out"
UNPROMPTED = "assistant's turns not learnt, since nothing comes before them"


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: What is tokenized, without more special tokens.
        spans: Character ranges to be learnt, ascending.
        notes: How many turns are not learnt, by reason.
        media: What the places for images and clips in the text stand for, in order.
    """

    text: str
    spans: list[Span]
    notes: Counter[str]
    media: Sequence[Any] = ()


class ChatTemplate:
    r"""Renders conversations and knows what in them was generated.

    Args:
        tokenizer: Its special tokens are variables of templates.
        template: The template's text. With ``{% generation %}`` markers it says itself what is learnt, apart from what
            the generation prompt supplies.
        variables: More of the template's variables, such as ``enable_thinking``.
        stop_ids: Tokens at which the model stops: ``eos_token_id`` of its generation config.

    Attributes:
        unwritten: What the generation prompt has behind an assistant's header that the template does not write in front
            of answers ("<think>\n" in DeepSeek's); mostly "". Models are then asked with it and trained without.

    Raises:
        ValueError: If the template cannot render a question and its answer, or ends the answer with a token at which
            the model does not stop.
    """

    def __init__(self, tokenizer: Any, template: str, variables: Mapping[str, Any], stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._variables = dict(variables)
        self.marked = adapter.marks_generation(template)
        self._endings: dict[bool, str] = {}
        self._texts_as_arguments = wants_texts_as_arguments(tokenizer, template, self._variables)
        self._writes_calls = _NAME in self._try([_QUESTION, _CALL, _RESULT, _ANSWER])
        self._writes_tools = _NAME in self._try([_QUESTION, _ANSWER], [_TOOL])
        self._check_end(stop_ids)
        self._stops = self._tokens(stop_ids)
        self._stop = re.compile("|".join(re.escape(token) for token in sorted(self._stops, key=len, reverse=True)))

        answered = [_QUESTION, _ANSWER]
        text, marks = self._render(answered)
        prompt, _ = self._render(answered[:1], prompt=True)
        first = self._said(text, answered, None, 1)[0]
        self.unwritten = prompt[_shared(prompt, text[:first]) :]
        thought, _ = self._render([_QUESTION, {**_ANSWER, "reasoning_content": _PROBE}])
        self._without_reasoning = text.startswith(prompt) and not thought.startswith(prompt)  # enable_thinking=False
        self._prompt_in_marks = self.marked and bool(marks) and marks[0][0] < len(prompt)
        again, _ = self._render([*answered, *answered])
        self._earlier_differ = self._as_generated(again, [*answered, *answered], None, 1) is None

    def render(self, messages: Sequence[Message], trained: Sequence[bool], tools: Any) -> Rendered:
        """Render a conversation.

        Args:
            messages: As `Conversation` has them.
            trained: Of each message, whether it is to be learnt.
            tools: Schemas of tools, or None.

        Raises:
            ValueError: If the template refuses the conversation or leaves out a call of a tool.
        """
        turns = [index for index, learnt in enumerate(trained) if learnt]
        thoughts = [_thought(messages[turn]) for turn in turns]
        if self._without_reasoning:
            messages = [_without_thought(message) for message in messages]
        text, marks = self._render(messages, tools)
        self._refuse_lost_calls(text, messages, tools)
        notes = Counter({LOST_TOOLS: int(tools is not None and not self._writes_tools)})
        spans = []
        if self.marked:
            spans = self._marked(text, marks, messages, turns, tools)
        else:
            last_question = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
            for turn in turns:
                span = None
                if turn > last_question or not self._earlier_differ:
                    span = self._as_generated(text, messages, tools, turn)
                if span is None and turn > last_question:
                    span = self._rendered_otherwise(text, messages, tools, turn)
                if span is None:
                    notes[DIFFERENT if turn else UNPROMPTED] += 1
                else:
                    spans.append(span)
        if spans and spans[-1][1] == len(text) and not text.endswith(tuple(self._stops)):
            text += self._ending(calls=bool(messages[-1].get("tool_calls")))
            spans[-1] = (spans[-1][0], len(text))
        if len(spans) == len(turns):
            notes[LOST_REASONING] = sum(
                thought not in text[slice(*s)] for thought, s in zip(thoughts, spans, strict=True)
            )
        return Rendered(text, [span for span in spans if span[0] < span[1]], +notes)

    def _render(self, messages: Sequence[Message], tools: Any = None, prompt: bool = False) -> tuple[str, list[Span]]:
        if self._texts_as_arguments:
            messages = [with_text_arguments(message) for message in messages]
        return adapter.render_chat(self._tokenizer, self._template, messages, tools, prompt, **self._variables)

    def _prompt(self, messages: Sequence[Message], tools: Any) -> str | None:
        """What a model is given to answer; None if there is nothing to answer, or the template would not ask."""
        try:
            return self._render(messages, tools, prompt=True)[0] if messages else None
        except ValueError:
            return None

    def _as_generated(self, text: str, messages: Sequence[Message], tools: Any, turn: int) -> Span | None:
        """Where a turn is, if the text up to its end is what the model was given and what it made of that."""
        last = turn == len(messages) - 1
        until = text if last else self._try(messages[: turn + 1], tools)
        end = self._end_of_turn(until)
        if not text.startswith(until[:end]):
            return None
        prompt = self._prompt(messages[:turn], tools)
        if prompt is None or len(prompt) > end or not text.startswith(prompt):
            return None
        if end == len(until):  # the next message begins with what ended this one (GLM-4)
            follows = self._stop.match(text, end)
            end = follows.end() if follows else end
        return len(prompt), end

    def _end_of_turn(self, text: str) -> int:
        """Behind the first of the tokens, at which a model stops, that end a text; behind the text if there is none."""
        end, found = len(text), len(text)
        while True:
            end = len(text[:end].rstrip())
            stop = next((token for token in self._stops if text.endswith(token, 0, end)), None)
            if stop is None:
                return found
            found, end = end, end - len(stop)

    def _rendered_otherwise(self, text: str, messages: Sequence[Message], tools: Any, turn: int) -> Span | None:
        """Where a turn is that the template renders differently once more follows, or from its own prompt."""
        begin, after = self._begin(text, messages, tools, turn), len(text)
        try:
            last = self._said(text, messages, tools, turn)[1]
            if turn + 1 < len(messages):
                after = self._said(text, messages, tools, turn + 1)[0]
        except ValueError:
            return None
        stop = self._stop.search(text, last, after)
        if begin is None or (stop is None and after < len(text)):
            return None
        return begin, stop.end() if stop else len(text)

    def _begin(self, text: str, messages: Sequence[Message], tools: Any, turn: int) -> int | None:
        """Where a turn begins: behind as much of the prompt as the template writes in front of it."""
        prompt = self._prompt(messages[:turn], tools)
        if prompt is None:
            return None
        for written in (prompt, prompt.removesuffix(self.unwritten)):
            if text.startswith(written):
                return len(written)
        # Earlier messages are written differently now (gpt-oss), or the prompt goes on with more than a header (the
        # think block of Qwen3): then the header is what the prompt has in common with a turn that is content alone.
        plain = [*messages[:turn], {"role": "assistant", "content": _PROBE}, *messages[turn + 1 :]]
        other = self._try(plain, tools)
        if not other:  # results of no call
            plain = plain[: turn + 1]
            other = self._try(plain, tools)
        try:
            before = self._said(text, messages, tools, turn - 1)[1]
            first = self._said(text, messages, tools, turn)[0]
            asked = prompt[self._said(prompt, messages[:turn], tools, turn - 1, prompt=True)[1] :]
            header = _shared(asked, other[self._said(other, plain, tools, turn - 1)[1] :])
        except ValueError:  # the template does not like a probe
            return None
        return before + _shared(text[before:first], asked[:header]) if before <= first else None

    def _said(self, text: str, messages: Sequence[Message], tools: Any, index: int, prompt: bool = False) -> Span:
        """What a message says in a text: the range that changes with it."""
        probed = [*messages[:index], _probed(messages[index]), *messages[index + 1 :]]
        other, _ = self._render(probed, tools, prompt)
        first = _shared(text, other)
        shorter = min(len(text), len(other)) - first
        return first, len(text) - _shared(text[::-1][:shorter], other[::-1][:shorter])

    def _marked(
        self, text: str, marks: list[Span], messages: Sequence[Message], turns: list[int], tools: Any
    ) -> list[Span]:
        """The ranges that generation markers enclose, without what the prompt supplies and what follows the end."""
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        begins: list[int | None] = [None] * len(assistants)
        if self._prompt_in_marks or len(marks) != len(assistants):
            begins = [self._begin(text, messages, tools, index) for index in assistants]
        spans = []
        for number, (begin, end) in enumerate(marks):
            if len(marks) != len(assistants):  # several places of a turn may be marked, or none (phi3, Gemma)
                before = [index for index, given in enumerate(begins) if given is not None and given <= end]
                number = before[-1] if before else 0
            given = begins[number]
            if assistants[number] in turns:
                begin = given if given is not None and begin < given <= end else begin
                spans.append((begin, max(begin, self._end_of_turn(text[:end]))))
        return spans

    def _ending(self, calls: bool) -> str:
        """What ends a turn where the template writes it as the beginning of the next message (GLM-4); "" if nothing."""
        if calls not in self._endings:
            said, answer = ([_QUESTION, _CALL], _RESULT) if calls else ([_QUESTION, _ANSWER], _QUESTION)
            between = self._before_next(said, answer)
            stop = self._stop.search(between)
            self._endings[calls] = between[: stop.end()] if stop else ""
        return self._endings[calls]

    def _before_next(self, messages: Sequence[Message], message: Message) -> str:
        """What the template writes between a conversation and what one more message says."""
        longer = [*messages, message]
        try:
            text, longer_text = self._render(messages)[0], self._render(longer)[0]
            first = self._said(longer_text, longer, None, len(messages))[0]
        except ValueError:  # there is no such message
            return ""
        return longer_text[len(text) : first] if longer_text.startswith(text) else ""

    def _try(self, messages: Sequence[Message], tools: Any = None) -> str:
        try:
            return self._render(messages, tools)[0]
        except ValueError:
            return ""

    def _refuse_lost_calls(self, text: str, messages: Sequence[Message], tools: Any) -> None:
        for index, message in enumerate(messages):
            calls = message.get("tool_calls") or []
            lost = len(calls) if not self._writes_calls else 0
            if len(calls) > 1 and not lost:
                fewer = [*messages[:index], {**message, "tool_calls": calls[:1]}, *messages[index + 1 :]]
                lost = len(calls) - 1 if self._try(fewer, tools) == text else 0
            if lost:
                raise ValueError(
                    f"the chat template leaves out {lost} of the {len(calls)} tool calls of a message, so that a model "
                    "would learn to say nothing instead. Give a template that writes them as `chat_template`, or split "
                    "the message."
                )

    def _check_end(self, stop_ids: Collection[int]) -> None:
        """Raises ValueError if the model does not stop at what the template ends an answer with."""
        chat = [_QUESTION, _ANSWER]
        text, _ = self._render(chat)
        behind = text[self._said(text, chat, None, 1)[1] :]
        ends = behind + self._before_next(chat, _QUESTION)
        if any(token in ends for token in self._tokens(stop_ids)):
            return
        special = {
            token.content: number for number, token in self._tokenizer.added_tokens_decoder.items() if token.special
        }
        written = min((token for token in special if token in ends), key=ends.index, default=None)
        if written is None:
            raise ValueError(
                f"The chat template writes no special token behind an assistant's answer, but {ends!r}: a model could "
                "not learn where to stop. Let the template write {{ eos_token }} there."
            )
        raise ValueError(
            f"The chat template ends an assistant's answer with {written!r} ({special[written]}), at which the model "
            f"does not stop: eos_token_id of its generation config is {sorted(stop_ids)}. Trained so, it would go on "
            f"for ever once it is served. Let generation_config.json beside its weights have "
            f'"eos_token_id": {[*sorted(stop_ids), special[written]]}; exports keep that.'
        )

    def _tokens(self, ids: Collection[int]) -> list[str]:
        return [token for token in self._tokenizer.convert_ids_to_tokens(sorted(ids)) if token]


def wants_texts_as_arguments(tokenizer: Any, template: str, variables: Mapping[str, Any]) -> bool:
    """Whether arguments of a tool's call have to be JSON text: most templates take a dict, DeepSeek's fails."""
    chat = [_QUESTION, _CALL, _RESULT, _ANSWER]

    def rendered(messages: Sequence[Message]) -> str:
        try:
            return adapter.render_chat(tokenizer, template, messages, None, False, **variables)[0]
        except ValueError:
            return ""

    with_dict, with_text = rendered(chat), rendered([with_text_arguments(message) for message in chat])
    return bool(with_text) and (not with_dict or "{'a': 'b'}" in with_dict)  # that is how Python writes it


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return bisect_left(range(min(len(one), len(other))), True, key=lambda n: one[: n + 1] != other[: n + 1])


def _probed(message: Message) -> dict[str, Any]:
    """A message that says something else in the same form."""
    other = dict(message)
    for key in ("content", "reasoning_content"):
        if message.get(key):
            other[key] = _PROBE
    if calls := message.get("tool_calls"):
        other["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": {_PROBE: _PROBE}}} for call in calls
        ]
    if other == message:  # it says nothing
        other["content"] = _PROBE
    return other


def _thought(message: Message) -> str:
    """The reasoning of an assistant, also where it stands in front of the answer; "" without."""
    inline = _INLINE.match(message["content"])
    return (message.get("reasoning_content") or (inline[1] if inline else "")).strip()


def _without_thought(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    others = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**others, "content": _INLINE.sub("", message["content"])}


def with_text_arguments(message: Message) -> Message:
    """A message whose calls of tools have JSON text as arguments."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}
