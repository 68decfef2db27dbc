"""From conversations to samples: which tokens a model is given, and which of them it learns."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np

from lightning_ep.data.chat_template import ChatTemplate, Rendered, Span
from lightning_ep.data.conversations import Conversation, MalformedRow, refuse
from lightning_ep.data.preparation import Samples

SHORTENED = "conversations that lost turns from their front, being longer than a window"
MALFORMED = "malformed rows"


@dataclass(frozen=True)
class RendersConversations:
    """Makes samples of conversations.

    Args:
        tokenizer: A fast tokenizer: one that knows which characters a token stands for.
        template: How conversations are written.
        sequence_length: The most tokens of a sample.
        split_turns: A sample for each of the assistant's turns, which is rendered as the last one: as the model will be
            asked, and with its reasoning. Otherwise one for the conversation.
        too_long: Longer conversations lose whole turns from their front ("shorten"), system prompt and tools apart, or
            are left out ("drop").
        malformed: What cannot be rendered is refused, or left out and counted ("skip").
    """

    tokenizer: Any
    template: ChatTemplate
    sequence_length: int
    split_turns: bool = False
    too_long: Literal["shorten", "drop"] = "shorten"
    malformed: Literal["refuse", "skip"] = "refuse"

    def __call__(self, conversations: Sequence[Conversation], samples: Samples) -> None:
        """Add the samples of conversations, in their order; what others come along makes no difference.

        Raises:
            MalformedRow: If the template refuses one.
        """
        made: list[tuple[Conversation, Rendered]] = []
        malformed: list[MalformedRow] = []
        for whole in conversations:
            try:
                made += [(part, self.render(part)) for part in self._parts(whole)]
            except MalformedRow as error:
                malformed.append(error)
                samples.drop(MALFORMED)
        if self.malformed == "refuse":
            refuse(malformed)
        if not made:
            return
        for (conversation, rendered), encoding in zip(
            made, self._tokenize([rendered.text for _, rendered in made]), strict=True
        ):
            if len(encoding) > self.sequence_length:
                shorter = self._shorten(conversation) if self.too_long == "shorten" else None
                if shorter is not None:  # otherwise it is left out, as all that no window holds
                    samples.note(SHORTENED)
                    rendered = self.render(shorter)
                    (encoding,) = self._tokenize([rendered.text])
            for note, count in rendered.notes.items():
                samples.note(note, count)
            learnt = tokens_within(encoding.offsets, rendered.spans).tolist()
            samples.add(encoding.ids, learnt, rendered.media)

    def _parts(self, whole: Conversation) -> Iterator[Conversation]:
        """What becomes a sample each, ending with a message that is learnt."""
        turns = [index for index, learnt in enumerate(whole.trained) if learnt]
        turns = turns or [len(whole.messages) - 1]  # nothing is learnt: it will be counted
        for turn in turns if self.split_turns else turns[-1:]:
            before = [False] * turn if self.split_turns else whole.trained[:turn]
            trained = [*before, whole.trained[turn]]
            yield whole._replace(messages=whole.messages[: turn + 1], trained=trained)

    def render(self, conversation: Conversation) -> Rendered:
        """A conversation as text; raises MalformedRow."""
        try:
            return self.template.render(conversation.messages, conversation.trained, conversation.tools)
        except ValueError as error:
            raise MalformedRow(f"{conversation.where}: {error}") from error

    def _tokenize(self, texts: list[str]) -> Sequence[Any]:
        # A template writes the special tokens itself: one more would be a second BOS.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False).encodings

    def _shorten(self, conversation: Conversation) -> Conversation | None:
        """The longest end that fits, which begins with a user's message behind the system's; None if there is none."""
        roles = [message["role"] for message in conversation.messages]
        head = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(roles))
        begins = [i for i, role in enumerate(roles) if role == "user" and i > head and any(conversation.trained[i:])]

        def cut(begin: int) -> Conversation:
            return conversation._replace(
                messages=conversation.messages[:head] + conversation.messages[begin:],
                trained=conversation.trained[:head] + conversation.trained[begin:],
            )

        def fits(begin: int) -> bool:
            (encoding,) = self._tokenize([self.render(cut(begin)).text])
            return len(encoding) <= self.sequence_length

        try:
            place = bisect_left(begins, True, key=fits)
        except MalformedRow:  # not in its own right: the template does not like this beginning
            return None
        return cut(begins[place]) if place < len(begins) else None


def tokens_within(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Which tokens stand for characters of the spans, and for no others.

    A token that begins in front of a span is not in it: the model would have been given its first characters. A
    character may be several tokens, each with all of its offsets, and some tokenizers leave spaces out of them.

    Args:
        offsets: Where each token's characters begin and end, in the order of the text.
        spans: Character ranges, ascending.

    Returns:
        bool ``[len(offsets)]``.
    """
    within = np.zeros(len(offsets), dtype=bool)
    if not len(offsets) or not spans:
        return within
    begins, ends = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2).T
    reached = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])  # where the token before ended
    begins = np.minimum(begins, reached)
    for first, last in spans:
        # A special token of the tokenizer's own has no characters: it would be in a span that begins the text.
        within |= (begins >= first) & (ends <= last) & (ends > first)
    return within
