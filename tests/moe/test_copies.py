"""The protocol of copies between ranks by its twin on CPUs: ranks are threads, which come late wherever they can.

What arrives is compared with what was sent, element by element; the product's dispatcher is in `test_copy_engine.py`.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ep.moe.dispatch.copy_engine.cuda import _Operation
from lightning_ep.moe.dispatch.copy_engine.dispatcher import RowMatrix
from lightning_ep.moe.dispatch.copy_engine.ring import SLOTS, Counter, Lane, Ring
from lightning_ep.moe.dispatch.copy_engine.twin import SharedMemory, bytes_needed

CAPACITY = 4096
WIDTH = 3


class _Late(SharedMemory):
    """Every operation comes late, in both lanes, by up to ``late`` seconds."""

    late = 2e-3

    def do(self, lane: Lane, operation: Callable[[], object]) -> None:
        def later() -> object:
            time.sleep(random.uniform(0, self.late))
            return operation()

        super().do(lane, later)


class _SlowReader(SharedMemory):
    """Rank 1 reads what it got in its third exchange only after a second."""

    reads = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.reads += 1
        if self.rank == 1 and self.reads == 3 * (self.size - 1):
            self.do(Lane.COPIES, lambda: time.sleep(1.0))
        super().copy(target, source)


class _SlowWriter(SharedMemory):
    """Rank 1 writes its third rows only after a second."""

    def signal(self, lane: Lane, counter: Counter, ranks: Sequence[int], number: int) -> None:
        super().signal(lane, counter, ranks, number)
        if self.rank == 1 and counter is Counter.READ and number == 2:
            time.sleep(1.0)


class _WritesAtOnce(_SlowReader):
    """Breaks the rule that a slot is written when it has been read."""

    def wait(self, lane: Lane, counter: Counter, ranks: Sequence[int], number: int) -> None:
        if counter is not Counter.READ:
            super().wait(lane, counter, ranks, number)


class _ReadsAtOnce(_SlowWriter):
    """Breaks the rule that a slot is read when it has been written."""

    def wait(self, lane: Lane, counter: Counter, ranks: Sequence[int], number: int) -> None:
        if counter is not Counter.READY:
            super().wait(lane, counter, ranks, number)


def _rows_of(step: int, sender: int, receiver: int, rows: int) -> Tensor:
    first = ((step * 8 + sender) * 8 + receiver) * 100
    return (first + torch.arange(rows).unsqueeze(1) + torch.zeros(WIDTH)).double()


def _matrices(size: int, steps: int, seed: int) -> list[tuple[tuple[int, ...], ...]]:
    """Rows that everybody sends to everybody: few, or none, of some ranks to all or to none."""
    draw = random.Random(seed)
    room = CAPACITY // (8 * WIDTH) // size
    kinds: list[Callable[[int, int], int]] = [
        lambda sender, receiver: draw.randint(0, room),
        lambda sender, receiver: draw.choice([0, 1, room]),
        lambda sender, receiver: room if receiver == 0 else 0,
        lambda sender, receiver: 0 if sender == 1 else 2,
        lambda sender, receiver: 0,
    ]
    return [
        tuple(tuple(kind(sender, receiver) for receiver in range(size)) for sender in range(size))
        for kind in (draw.choices(kinds, weights=[6, 3, 1, 1, 1])[0] for _ in range(steps))
    ]


def _run(
    size: int,
    kind: type[SharedMemory],
    matrices: list[tuple[tuple[int, ...], ...]],
    number: int = 0,
    in_flight: int = 3,
) -> list[str]:
    """Exchanges rows of every matrix between threads; what came that should not have come."""
    ranks = [torch.zeros(bytes_needed(size, CAPACITY), dtype=torch.uint8) for _ in range(size)]
    for memory in ranks:
        memory.view(torch.int32)[: 2 * size].fill_(number if number < 2**31 else number - 2**32)
    wrong: list[str] = []

    def rank(me: int) -> None:
        ring, waiting = Ring(kind(me, ranks, CAPACITY), number), []
        draw = random.Random(me)
        for step, matrix in enumerate(matrices):
            splits = RowMatrix.of(me, matrix, fits=True)
            rows = torch.cat([_rows_of(step, me, to, count) for to, count in enumerate(splits.send)])
            if draw.random() < 0.5:  # written where they are made, or copied there
                rows = ring.room(rows.nbytes).view(rows.dtype).view(rows.shape).copy_(rows)
            received = torch.full((sum(splits.recv), WIDTH), -1.0, dtype=torch.float64)
            waiting.append((step, splits, received, ring.start(rows, received, splits.pieces)))
            while len(waiting) > (draw.randrange(in_flight) if step < len(matrices) - 1 else 0):
                before, splits, received, transfer = waiting.pop(0)
                transfer.wait()
                sent = [_rows_of(before, sender, me, count) for sender, count in enumerate(splits.recv)]
                if not torch.equal(received, torch.cat(sent)):
                    wrong.append(f"rank {me}, exchange {before}")
                received.fill_(-2.0)  # nobody writes there any more
        ring.drain()

    threads = [threading.Thread(target=rank, args=(me,), daemon=True) for me in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank waits for ever"
    return wrong


@pytest.mark.parametrize("size", range(2, 9))
def test_rows_arrive_whoever_is_late(size: int) -> None:
    assert _run(size, _Late, _matrices(size, 25, seed=size)) == []


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_as_many_exchanges_may_be_in_flight_as_one_likes(in_flight: int) -> None:
    assert _run(3, _Late, _matrices(3, 20, seed=in_flight), in_flight=in_flight) == []


@pytest.mark.parametrize("number", [2**31 - 7, 2**32 - 7])
def test_numbers_begin_again(number: int) -> None:
    assert _run(3, _Late, _matrices(3, 15, seed=1), number) == []


@pytest.mark.parametrize("kind", [_SlowReader, _SlowWriter])
def test_ranks_wait_for_one_that_is_late(kind: type[SharedMemory]) -> None:
    begin = time.monotonic()
    assert _run(3, kind, _full(3)) == []
    assert time.monotonic() - begin > 1.0, "somebody must have been late"


@pytest.mark.parametrize("kind", [_WritesAtOnce, _ReadsAtOnce])
def test_a_broken_rule_is_noticed(kind: type[SharedMemory]) -> None:
    assert _run(3, kind, _full(3)) != []


def _full(size: int) -> list[tuple[tuple[int, ...], ...]]:
    return [tuple((5,) * size for _ in range(size)) for _ in range(8)]


def test_stream_memory_operations_lie_as_cuda_h_has_them() -> None:
    fields = (_Operation.operation, _Operation.address, _Operation.value, _Operation.flags, _Operation.alias)
    assert [field.offset for field in fields] == [0, 8, 16, 24, 32]
    assert ctypes.sizeof(_Operation) == 48, "the union has a pad of six words"


def test_rows_that_do_not_fit_are_an_error() -> None:
    ring = Ring(SharedMemory(0, [torch.zeros(bytes_needed(1, 64), dtype=torch.uint8)], 64))
    with pytest.raises(AssertionError, match="65 bytes do not fit into a slot of 64"):
        ring.room(65)


def test_a_copy_that_fails_is_an_error_of_who_waits() -> None:
    memory = SharedMemory(0, [torch.zeros(bytes_needed(1, 64), dtype=torch.uint8)], 64)
    memory.copy(torch.zeros(2), torch.zeros(3))
    with pytest.raises(RuntimeError, match="has failed") as error:
        memory.mark(torch.zeros(2)).wait()
    assert "size" in str(error.value.__cause__)


def test_the_thread_of_copies_ends_with_its_memory() -> None:
    before = threading.active_count()
    memory: Any = SharedMemory(0, [torch.zeros(bytes_needed(1, 64), dtype=torch.uint8)], 64)
    assert threading.active_count() == before + 1
    del memory
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_splits_of_the_way_back_are_those_of_the_way_there_from_the_other_end() -> None:
    rows = ((1, 2, 3), (0, 4, 0), (7, 0, 5))
    there = RowMatrix.of(1, rows, fits=True)
    assert (there.send, there.recv) == ((0, 4, 0), (2, 4, 0))
    assert there.pieces == [(1, 0, 2), (0, 2, 4), (7, 6, 0)]
    assert there.largest == 12, "the last rank sends as many, and receives 8"
    back = there.back
    assert (back.send, back.recv, back.back) == (there.recv, there.send, there)
    assert back.pieces == [(1, 0, 0), (2, 0, 4), (3, 4, 0)]
    assert SLOTS == 2
