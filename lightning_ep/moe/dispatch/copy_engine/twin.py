"""The twin of `SymmetricMemory` on CPUs: memory that processes share, and a thread in place of the stream of copies."""

from __future__ import annotations

import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_ep.distributed.agreement import from_all_ranks
from lightning_ep.distributed.progress import Transfer
from lightning_ep.moe.dispatch.copy_engine.ring import SLOTS, Counter, Lane, Memory, counter_bytes

LARGEST = 2**26  # bytes of a slot: it is there to be tested
_LONGEST_PAUSE = 1e-3  # seconds between two looks at a counter


def bytes_needed(size: int, capacity: int) -> int:
    """Of one rank's memory: its counters, and its slots behind them."""
    return counter_bytes(size) + SLOTS * capacity


def open_shared_memory(group: dist.ProcessGroup, capacity: int) -> SharedMemory:
    """Memory of the processes of a group, as a file of each; every rank must call it.

    Raises:
        OSError: If a file cannot be made or found.
    """
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.NamedTemporaryFile(prefix="lightning-ep-", dir=folder) as own:
        size = bytes_needed(group.size(), capacity)
        os.truncate(own.name, size)
        names = from_all_ranks(own.name, group)
        missing = next((name for name in names if not Path(name).exists()), None)
        ranks = [torch.from_file(name, shared=True, size=size, dtype=torch.uint8) for name in names if missing is None]
        from_all_ranks(None, group)  # files have names until all have opened them
    if missing is not None:
        raise FileNotFoundError(f"{missing}, which another rank has made, is not here.")
    return SharedMemory(group.rank(), ranks, capacity)


class SharedMemory(Memory):
    """The host is the lane of the computation: what it is given has been done when the call returns.

    Args:
        rank: This rank.
        ranks: The memory of each rank, uint8 of `bytes_needed`, zero where nothing has been exchanged.
        capacity: Bytes of a slot.
    """

    def __init__(self, rank: int, ranks: Sequence[Tensor], capacity: int) -> None:
        super().__init__(rank, len(ranks), capacity)
        begin = counter_bytes(self.size)
        self._counters = [memory[:begin].view(torch.int32)[: 2 * self.size].view(2, self.size) for memory in ranks]
        self._slots = [memory[begin:].view(SLOTS, capacity) for memory in ranks]
        self._copies = _Copies()
        weakref.finalize(self, self._copies.operations.put, None)

    def do(self, lane: Lane, operation: Callable[[], object]) -> None:
        """Gives an operation to a lane."""
        if lane is Lane.COMPUTE:
            operation()
        else:
            self._copies.operations.put(operation)

    @override
    def slot(self, rank: int, index: int) -> Tensor:
        return self._slots[rank][index]

    @override
    def signal(self, lane: Lane, counter: Counter, ranks: Sequence[int], number: int) -> None:
        cells = [self._counters[rank][counter, self.rank] for rank in ranks]
        self.do(lane, lambda: [cell.fill_(_signed(number)) for cell in cells])

    @override
    def wait(self, lane: Lane, counter: Counter, ranks: Sequence[int], number: int) -> None:
        cells = [self._counters[self.rank][counter, rank] for rank in ranks]
        self.do(lane, lambda: _wait(cells, number))

    @override
    def fork(self) -> None:
        pass  # it has been done

    @override
    def copy(self, target: Tensor, source: Tensor) -> None:
        self.do(Lane.COPIES, lambda: target.copy_(source))

    @override
    def mark(self, received: Tensor) -> Transfer:
        mark = _Mark(received, self._copies)
        self.do(Lane.COPIES, mark.reached.set)
        return mark

    @override
    def drain(self) -> None:
        self.mark(torch.empty(0)).wait()


class _Copies:
    """A thread that does what it is given, in order, until that is None or fails."""

    def __init__(self) -> None:
        self.operations: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self.error: BaseException | None = None
        threading.Thread(target=self._run, name="lightning-ep-copies", daemon=True).start()

    @torch.inference_mode()  # in which alone rows that arrive in an evaluation may be written, and all others too
    def _run(self) -> None:
        try:
            while (operation := self.operations.get()) is not None:
                operation()
                del operation  # and what it holds, while the thread waits
        except BaseException as error:
            self.error = error


class _Mark:
    def __init__(self, received: Tensor, copies: _Copies) -> None:
        self.reached = threading.Event()
        self._received = received
        self._copies = copies

    def is_completed(self) -> bool:
        return self.reached.is_set()

    def wait(self) -> None:
        while not self.reached.wait(_LONGEST_PAUSE):
            if self._copies.error is not None:
                raise RuntimeError("A copy of rows between processes has failed.") from self._copies.error


def _wait(cells: Sequence[Tensor], number: int) -> None:
    pause = 1e-5
    while any(_signed(int(cell) - number) < 0 for cell in cells):
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def _signed(number: int) -> int:
    """The last 32 bits, as those of an int32."""
    return (number + 2**31) % 2**32 - 2**31
