"""How ranks read rows out of one another's memory: who writes which slot when, and who waits for which counter.

Every rank has two slots that all others can read, and counters that they can write. Exchanges are numbered, alike on
all ranks. In number ``n`` each rank

1. waits until every other one has read its number ``n - 2``, which lay in the same slot (its counters `Counter.READ`),
   and writes its rows there;
2. tells all others that they are there (their counters `Counter.READY`);
3. waits for the rows of each, copies out its own part, and tells each that it has read.

1 and 2 are in the lane of the computation, 3 is in a lane of copies beside it. The host waits in none of them. Whatever
waits for number ``n`` of a rank waits for what that rank does before it waits for number ``n`` itself, so nothing stops
all, also where the two lanes of a rank are one queue of its hardware.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum, IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ep.distributed.progress import Transfer

SLOTS = 2
ALIGNMENT = 256  # bytes, of slots
_NUMBERS = 2**32  # counters begin again at 0 and are compared as 32 signed bits


class Lane(Enum):
    """What is given to one lane runs in that order."""

    COMPUTE = 0  # the current stream
    COPIES = 1


class Counter(IntEnum):
    """Each rank has one of each kind for every other rank, which alone writes it."""

    READY = 0  # the newest exchange for which that rank's rows are there
    READ = 1  # the newest exchange of which that rank has read these rows


class Memory(ABC):
    """Slots and counters of all ranks of a group, and the lanes that work on them.

    Args:
        rank: This rank in the group.
        size: Ranks of the group.
        capacity: Bytes of a slot.
    """

    def __init__(self, rank: int, size: int, capacity: int) -> None:
        self.rank = rank
        self.size = size
        self.capacity = capacity

    @abstractmethod
    def slot(self, rank: int, index: int) -> Tensor:
        """A slot of any rank, uint8 ``[capacity]``."""

    @abstractmethod
    def signal(self, lane: Lane, counter: Counter, ranks: Sequence[int], number: int) -> None:
        """Sets this rank's counter at each of ``ranks``, where what the lane had been given before can then be seen."""

    @abstractmethod
    def wait(self, lane: Lane, counter: Counter, ranks: Sequence[int], number: int) -> None:
        """Has the lane wait until the counters here of all these ranks have come to ``number``."""

    @abstractmethod
    def fork(self) -> None:
        """Has the lane of copies wait for what that of the computation has been given so far."""

    @abstractmethod
    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copies bytes in the lane of copies."""

    @abstractmethod
    def mark(self, received: Tensor) -> Transfer:
        """What is over when the lane of copies has come here, and keeps ``received`` until then.

        Waiting for it has the lane of the computation wait.
        """

    @abstractmethod
    def drain(self) -> None:
        """Waits, on the host, until both lanes have done what they were given."""


def counter_bytes(size: int) -> int:
    """Bytes of the counters of a rank of a group of ``size``, behind which its slots may begin."""
    return -(-len(Counter) * size * torch.int32.itemsize // ALIGNMENT) * ALIGNMENT


class Piece(NamedTuple):
    """What a rank gets from another one, in rows: where they begin there, where here, and how many they are."""

    there: int
    here: int
    rows: int


class Ring:
    """The exchanges of one rank; see the head of this file.

    Args:
        memory: Slots, counters and lanes. Counters begin at ``number``.
        number: Of the newest exchange that has been; 0 but in tests.
    """

    def __init__(self, memory: Memory, number: int = 0) -> None:
        self._memory = memory
        self._number = number
        self._others = [(memory.rank + step) % memory.size for step in range(1, memory.size)]
        self._is_open = False  # whether the next exchange may write its slot

    @property
    def capacity(self) -> int:
        """Bytes that a rank can send in an exchange."""
        return self._memory.capacity

    def room(self, num_bytes: int) -> Tensor:
        """Where the rows of the next exchange are best written, uint8 ``[num_bytes]``: `start` need not copy them."""
        assert num_bytes <= self.capacity, f"{num_bytes} bytes do not fit into a slot of {self.capacity}"
        number = self._number + 1
        if not self._is_open:
            self._memory.wait(Lane.COMPUTE, Counter.READ, self._others, (number - SLOTS) % _NUMBERS)
            self._is_open = True
        return self._memory.slot(self._memory.rank, number % SLOTS)[:num_bytes]

    def start(self, rows: Tensor, received: Tensor, pieces: Sequence[Piece]) -> Transfer:
        """Starts an exchange; every rank must call it, with any number of rows.

        Args:
            rows: ``[S, ...]``, contiguous.
            received: ``[N, ...]``, contiguous, of the same dtype and width.
            pieces: By rank: what to read of its rows, and where to put it.

        Returns:
            The rows on their way; ``received`` must not be used before it has been waited for.
        """
        memory = self._memory
        sent_B, slot_B = _bytes(rows), self.room(rows.nbytes)
        if rows.nbytes and sent_B.data_ptr() != slot_B.data_ptr():
            slot_B.copy_(sent_B)
        number = self._number = (self._number + 1) % _NUMBERS
        self._is_open = False
        memory.signal(Lane.COMPUTE, Counter.READY, self._others, number)
        memory.fork()  # ``received`` may have been memory of what was computed before
        received_B, width = _bytes(received), _width(received)
        for rank in self._others:
            if pieces[rank].rows:
                memory.wait(Lane.COPIES, Counter.READY, [rank], number)
                there = memory.slot(rank, number % SLOTS)
                memory.copy(*_part(received_B, there, pieces[rank], width))
        memory.signal(Lane.COPIES, Counter.READ, self._others, number)
        transfer = memory.mark(received)
        # Within a GPU a copy needs SMs, so this one is where the arithmetic is.
        target, source = _part(received_B, slot_B, pieces[memory.rank], width)
        target.copy_(source)
        return transfer

    def drain(self) -> None:
        """Waits, on the host, until this rank has read all that it was given to read."""
        self._memory.drain()


def _part(received_B: Tensor, slot_B: Tensor, piece: Piece, width: int) -> tuple[Tensor, Tensor]:
    here, there, size = (rows * width for rows in (piece.here, piece.there, piece.rows))
    return received_B[here : here + size], slot_B[there : there + size]


def _width(rows: Tensor) -> int:
    """Bytes of a row."""
    return rows.shape[1:].numel() * rows.element_size()


def _bytes(rows: Tensor) -> Tensor:
    return rows.detach().view(-1).view(torch.uint8)
