"""Symmetric memory of the GPUs of a node: copies by their copy engines, ranks in order by stream memory operations.

Nothing in the lane of copies needs an SM, so it holds up no kernel. Measured on two H200: an exchange of 64 MiB takes
0.19 ms in place of NCCL's 0.31, and makes a grouped GEMM beside it 0.02 to 0.04 ms longer in place of 0.38.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_ep.distributed.progress import Transfer
from lightning_ep.moe.dispatch.copy_engine.ring import SLOTS, Counter, Lane, Memory, counter_bytes

# Of cuda.h. Waits are until (int32) (*address - value) >= 0.
_WAIT_VALUE_32, _WRITE_VALUE_32 = 1, 2
_WAIT_GEQ = 0
_WRITE_AFTER_BARRIER, _WRITE_WITHOUT_BARRIER = 0, 1


class _Operation(ctypes.Structure):
    """``CUstreamBatchMemOpParams``: a union of 48 bytes, here as the two of its members that are used."""

    _fields_ = (
        ("operation", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),  # or 32 bits, the first
        ("flags", ctypes.c_uint32),
        ("alias", ctypes.c_uint64),
        ("beyond", ctypes.c_uint64),
    )


class SymmetricMemory(Memory):
    """Memory of the processes of a group, each with a GPU of one node; every rank must make it.

    Args:
        group: The ranks.
        capacity: Bytes of a slot.
        device: This rank's GPU.

    Raises:
        RuntimeError: If it cannot be allocated, or the GPUs cannot map each other's.
    """

    def __init__(self, group: dist.ProcessGroup, capacity: int, device: torch.device) -> None:
        super().__init__(group.rank(), group.size(), capacity)
        from torch.distributed import _symmetric_memory  # only here: few processes need it

        counters = counter_bytes(self.size)
        buffer = _symmetric_memory.empty(counters + SLOTS * capacity, dtype=torch.uint8, device=device)
        handle = _symmetric_memory.rendezvous(buffer, group.group_name)
        self._kept = buffer, handle
        buffer[:counters].zero_()
        ranks = range(self.size)
        self._counters = [handle.get_buffer(rank, (2, self.size), torch.int32).data_ptr() for rank in ranks]
        begins = [counters + i * capacity for i in range(SLOTS)]
        self._slots = [[handle.get_buffer(rank, (capacity,), torch.uint8, at) for at in begins] for rank in ranks]
        self._slots[self.rank] = [buffer[at : at + capacity] for at in begins]  # which live as long as who holds them
        self._device = device
        # Of another priority than the current stream, with which it must not share a queue of the hardware: it waits
        # for other ranks there.
        self._copies = torch.cuda.Stream(device, priority=-1)
        # A driver that refuses such operations shows here, where all ranks can still agree on another way.
        self.signal(Lane.COMPUTE, Counter.READY, [self.rank], 0)
        self.wait(Lane.COMPUTE, Counter.READY, [self.rank], 0)
        torch.cuda.synchronize(device)  # counters are zero before any rank goes on from the agreement that follows

    @override
    def slot(self, rank: int, index: int) -> Tensor:
        return self._slots[rank][index]

    def _address(self, rank: int, counter: Counter, writer: int) -> int:
        return self._counters[rank] + (counter * self.size + writer) * torch.int32.itemsize

    @override
    def signal(self, lane: Lane, counter: Counter, ranks: Sequence[int], number: int) -> None:
        self._give(lane, [
            _Operation(
                _WRITE_VALUE_32, self._address(rank, counter, self.rank), number,
                # The first one has other GPUs see what came before them all.
                _WRITE_WITHOUT_BARRIER if i else _WRITE_AFTER_BARRIER,
            )
            for i, rank in enumerate(ranks)
        ])  # fmt: skip

    @override
    def wait(self, lane: Lane, counter: Counter, ranks: Sequence[int], number: int) -> None:
        self._give(lane, [
            _Operation(_WAIT_VALUE_32, self._address(self.rank, counter, rank), number, _WAIT_GEQ) for rank in ranks
        ])  # fmt: skip

    def _give(self, lane: Lane, operations: Sequence[_Operation]) -> None:
        stream = self._copies if lane is Lane.COPIES else torch.cuda.current_stream(self._device)
        array = (_Operation * len(operations))(*operations)
        status = _driver().cuStreamBatchMemOp_v2(ctypes.c_void_p(stream.cuda_stream), len(array), array, 0)
        if status != 0:
            raise RuntimeError(f"The CUDA driver refuses a stream memory operation: cuStreamBatchMemOp gives {status}.")

    @override
    def fork(self) -> None:
        self._copies.wait_stream(torch.cuda.current_stream(self._device))

    @override
    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    @override
    def mark(self, received: Tensor) -> Transfer:
        return _Mark(self._copies.record_event(), received)

    @override
    def drain(self) -> None:
        torch.cuda.synchronize(self._device)


class _Mark:
    def __init__(self, event: torch.cuda.Event, received: Tensor) -> None:
        self._event = event
        # The allocator may give memory of the current stream to another tensor as soon as nobody holds it.
        self._received = received

    def is_completed(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        torch.cuda.current_stream(self._received.device).wait_event(self._event)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
