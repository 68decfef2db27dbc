"""Documents are packed whole into windows of equal length: which ones share a window, and what the model is given."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from lightning_ep.ops.cross_entropy import IGNORE

BUFFER = 100_000
"""Documents that are looked at together: where 100,000 fill windows to 99.99 %, 1,000 fill them to 99.6 %."""

PADDING_RUN = 128
"""Tokens of padding that attend to each other.

One run of all padding would cost attention the square of its length. Runs of one token would cost a block of
FlashAttention each, and its blocks are about as long as this.
"""


PADDING = -1
"""A token that is none: where a document holds some, windows have padding."""


class Sample(NamedTuple):
    """One document.

    Attributes:
        input_ids: Its tokens; `PADDING` between parts of it that have rows of their own.
        supervised: For each of them, whether it is to be predicted. What is said of the first has no effect: there is
            nothing in the document to predict it from.
    """

    input_ids: Sequence[int]
    supervised: Sequence[bool]


COLUMNS = ("input_ids", "labels", "position_ids")
"""The fields of a `Window`, by which models know them, too."""


class Window(NamedTuple):
    """What a model is given, int32 ``[sequence_length]`` each.

    Attributes:
        input_ids: Documents one after the other, then padding.
        labels: The supervised tokens, not shifted, elsewhere -100. So is the first token of each document, which would
            be predicted from the document before.
        position_ids: From 0 in every document, by which attention tells them apart, and in every run of padding.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray


def best_fit(lengths: Sequence[int] | np.ndarray, sequence_length: int, buffer: int = BUFFER) -> Iterator[list[int]]:
    """Choose which documents share a window: best-fit decreasing, a buffer of documents at a time.

    Of the documents in the buffer the longest is placed first, each in the fullest window that has room for it, or in
    a new one (Johnson, 1973, "Near-optimal bin packing algorithms": at most 11/9 of the fewest windows possible, and a
    few). No document is cut. The result depends on nothing but the arguments.

    Args:
        lengths: Tokens of each document, 1 to ``sequence_length``.
        sequence_length: Tokens that a window holds.
        buffer: Documents that are looked at together; windows of one buffer are closed before the next.

    Yields:
        The documents of a window, as ascending indices into ``lengths``; windows by their first document, within a
        buffer.

    Raises:
        ValueError: If a document is empty or longer than a window.
    """
    for begin in range(0, len(lengths), buffer):
        part = np.asarray(lengths[begin : begin + buffer])
        if len(wrong := np.flatnonzero((part < 1) | (part > sequence_length))):
            index = int(wrong[0])
            raise ValueError(
                f"Document {begin + index} has {part[index]} tokens, and windows of {sequence_length} hold whole "
                f"documents of 1 to {sequence_length}."
            )
        windows = _best_fit_decreasing(part, sequence_length)
        yield from sorted(sorted(begin + index for index in window) for window in windows)


def _best_fit_decreasing(lengths: np.ndarray, sequence_length: int) -> list[list[int]]:
    windows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # heaps of windows, the oldest first
    rooms: list[int] = []  # the keys, ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, window = sequence_length, len(windows)
            windows.append([])
        else:
            room = rooms[place]
            window = heappop(by_room[room])
            if not by_room[room]:
                del by_room[room], rooms[place]
        windows[window].append(index)
        if room > length:
            if room - length not in by_room:
                by_room[room - length] = []
                insort(rooms, room - length)
            heappush(by_room[room - length], window)
    return windows


def fill_window(documents: Iterable[Sample], sequence_length: int, pad_token_id: int) -> Window:
    """Put documents into a window.

    What is left is padding that costs next to nothing in attention and is in no loss; that it is there no document
    sees. Which token pads makes no difference, so it may be one that documents end with.

    Args:
        documents: At most ``sequence_length`` tokens together.
        sequence_length: Tokens of the window.
        pad_token_id: What fills the rest.
    """
    input_ids = np.full(sequence_length, PADDING, dtype=np.int32)
    labels = np.full(sequence_length, IGNORE, dtype=np.int32)
    begins = np.zeros(sequence_length, dtype=np.bool_)
    end = 0
    for ids, supervised in documents:
        begin, end = end, end + len(ids)
        input_ids[begin:end] = ids
        labels[begin:end] = np.where(supervised, input_ids[begin:end], IGNORE)
        begins[begin] = True
    padding = input_ids == PADDING
    begins[1:] |= padding[1:] != padding[:-1]
    labels[begins] = IGNORE
    begins[0] = True
    places = np.arange(sequence_length, dtype=np.int32)
    position_ids = places - np.maximum.accumulate(np.where(begins, places, 0))
    position_ids[padding] %= PADDING_RUN
    input_ids[padding] = pad_token_id
    return Window(input_ids, labels, position_ids)


def number_of_tokens(input_ids: Sequence[int] | np.ndarray) -> int:
    """Tokens of a document, without the padding in it."""
    return int((np.asarray(input_ids) != PADDING).sum())


@dataclass
class Fill:
    """Counts what windows hold.

    Attributes:
        sequence_length: Tokens of a window.
        windows: Number of windows.
        documents: Documents in them.
        tokens: Tokens of documents.
        supervised: Tokens that are predicted.
    """

    sequence_length: int
    windows: int = 0
    documents: int = 0
    tokens: int = 0
    supervised: int = 0

    def add(self, window: Window, documents: int, tokens: int) -> None:
        """Counts a window that holds so many documents of so many tokens."""
        self.windows += 1
        self.documents += documents
        self.tokens += tokens
        self.supervised += int((window.labels != IGNORE).sum())

    @property
    def fill_rate(self) -> float:
        """Share of the windows' tokens that is no padding."""
        return self.tokens / max(1, self.windows * self.sequence_length)

    @property
    def supervised_share(self) -> float:
        """Share of the documents' tokens that is predicted."""
        return self.supervised / max(1, self.tokens)


def last_answers(batch: Mapping[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """What documents end with, and what stands before it: the last run of supervised tokens, which is an answer.

    Args:
        batch: ``input_ids`` and ``labels``, integers ``[B, S]``, and ``position_ids`` where rows are packed (`Window`).

    Yields:
        Ids in front of the last run of supervised tokens, and its own, of every document that has both.
    """
    rows = [batch[name].tolist() for name in COLUMNS if name in batch]
    for ids, labels, *positions in zip(*rows, strict=True):
        begins = [place for place, number in enumerate(positions[0]) if number == 0] if positions else [0]
        for begin, end in pairwise([*begins, len(ids)]):
            supervised = [label != IGNORE for label in labels[begin:end]]
            if True not in supervised:
                continue
            last = end - supervised[::-1].index(True)
            first = last
            while first > begin and labels[first - 1] != IGNORE:
                first -= 1
            if first > begin:
                yield ids[begin:first], ids[first:last]
