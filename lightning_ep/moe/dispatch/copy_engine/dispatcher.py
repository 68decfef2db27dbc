"""Rows travel by copies out of the memory of other ranks of the node, and no GPU needs an SM for it."""

from __future__ import annotations

import socket
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_ep.distributed.agreement import from_all_ranks
from lightning_ep.distributed.host_copies import OnHost
from lightning_ep.distributed.progress import Progress
from lightning_ep.moe.dispatch.all_to_all import COUNT, AllToAllDispatcher, AllToAllPlan, Count, Splits
from lightning_ep.moe.dispatch.base import Pending
from lightning_ep.moe.dispatch.copy_engine import twin
from lightning_ep.moe.dispatch.copy_engine.cuda import SymmetricMemory
from lightning_ep.moe.dispatch.copy_engine.ring import ALIGNMENT, SLOTS, Memory, Piece, Ring
from lightning_ep.planner.traffic import SLOTS_OF_DEVICE

_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name before torch 2.13
_GROWTH = 5 / 4  # at least, so that batches that get longer and longer do not make new slots each time


@dataclass(frozen=True)
class RowMatrix(Splits):
    """Adds what all ranks send to all, so that each finds its rows in the memory of another one.

    Attributes:
        rank: This rank.
        rows_DD: By sender, then by receiver.
        fits: Whether these rows, and those of the way back, find room in the slots of all ranks.
    """

    rank: int
    rows_DD: tuple[tuple[int, ...], ...]
    fits: bool

    @staticmethod
    def of(rank: int, rows_DD: tuple[tuple[int, ...], ...], fits: bool) -> RowMatrix:
        """The splits of a rank."""
        return RowMatrix(rows_DD[rank], tuple(row[rank] for row in rows_DD), rank, rows_DD, fits)

    @property
    @override
    def back(self) -> RowMatrix:
        return RowMatrix.of(self.rank, tuple(zip(*self.rows_DD, strict=True)), self.fits)

    @property
    def largest(self) -> int:
        """Rows of the rank that sends the most, or receives the most and sends them back."""
        return max(map(sum, (*self.rows_DD, *zip(*self.rows_DD, strict=True))))

    @property
    def pieces(self) -> list[Piece]:
        """What this rank gets from each. Rows lie by receiver where they are sent from, and arrive by sender."""
        return [
            Piece(sum(row[: self.rank]), sum(self.recv[:sender]), row[self.rank])
            for sender, row in enumerate(self.rows_DD)
        ]


class Slots:
    """The ring of an EP group, which its layers share: made when the first rows travel, and again when more rows do.

    Attributes:
        ring: None as long as there is none; it is the same on all ranks whether there is one, and of which capacity.
        refused: Why there will be none, or no larger one.
    """

    def __init__(self) -> None:
        self.ring: Ring | None = None
        self.refused: str | None = None

    @property
    def capacity(self) -> int:
        """Bytes that a rank can send in an exchange."""
        return 0 if self.ring is None else self.ring.capacity

    def grow(self, group: dist.ProcessGroup, device: torch.device, num_bytes: int) -> None:
        """Makes slots for as many bytes as any rank asks for, if that is not too many; every rank must call it."""
        if self.ring is not None:
            self.ring.drain()  # so that when all have answered nobody reads slots that are about to go
        answers = from_all_ranks((_node(), num_bytes, largest_slot(device)), group)
        if len({node for node, _, _ in answers}) > 1:
            self.refused = "its ranks are on several nodes"
            return
        wanted = max(*(asked for _, asked, _ in answers), int(_GROWTH * self.capacity))
        limit = min(limit for _, _, limit in answers)
        if wanted > limit:
            self.refused = f"that takes {wanted / 2**20:,.0f} MiB per slot, of which there may be {limit / 2**20:,.0f}"
            wanted = limit
        wanted = -(-wanted // ALIGNMENT) * ALIGNMENT
        if wanted <= self.capacity:
            return
        self.ring = None  # first, so that the new one may lie where it was
        memory, problem = None, None
        try:
            with torch.inference_mode(False):  # slots outlive an evaluation that comes first, and are written after it
                memory = _open_memory(group, wanted, device)
        except (RuntimeError, OSError) as error:
            problem = f"{type(error).__name__}: {error}"
        problem = next((found for found in from_all_ranks(problem, group) if found is not None), None)
        if problem is not None:
            self.refused = f"their memory cannot be shared ({problem})"
            return
        assert memory is not None
        self.ring = Ring(memory)


def _node() -> str:
    """What processes on one node have in common."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # which some sandboxes do not show
    return boot.read_text() if boot.exists() else socket.gethostname()


def largest_slot(device: torch.device) -> int:
    """Bytes of the largest slot that a rank may have."""
    if device.type != "cuda":
        return twin.LARGEST
    return int(SLOTS_OF_DEVICE * torch.cuda.get_device_properties(device).total_memory) // SLOTS


def _open_memory(group: dist.ProcessGroup, capacity: int, device: torch.device) -> Memory:
    if device.type == "cuda":
        return SymmetricMemory(group, capacity, device)
    return twin.open_shared_memory(group, capacity)


_slots: weakref.WeakKeyDictionary[dist.ProcessGroup, Slots] = weakref.WeakKeyDictionary()


class CopyEngineDispatcher(AllToAllDispatcher):
    """An `AllToAllDispatcher` whose rows are copied by their receivers, out of where their senders have written them.

    Bit for bit the same arrives, in the same order. Counts still travel as a collective, of which every rank gets those
    of all ranks: where rows do not fit into the slots, all know it, and these rows travel as a collective as well.

    Args:
        num_experts: Experts of the layer over all ranks.
        group: The EP group.
        layer: Name of the layer, for messages.
        progress: Where this rank notes what it is waiting for. Its thread ends this process when another rank is not
            heard of for nine tenths of the group's time-out.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup, layer: str, progress: Progress) -> None:
        super().__init__(num_experts, group, layer, progress)
        self._slots = _slots.setdefault(group, Slots())

    @override
    def new_rows(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, splits: Splits | None = None
    ) -> Tensor:
        num_bytes = shape[0] * shape[1] * dtype.itemsize
        ring = self._slots.ring
        fits = num_bytes <= self._slots.capacity if splits is None else cast(RowMatrix, splits).fits
        if ring is None or not fits:
            return super().new_rows(shape, dtype, device)
        return ring.room(num_bytes).view(dtype).view(shape)

    @override
    def exchange_counts(self, counts_2D2: Tensor) -> Callable[[], tuple[list[list[Count]], list[Count]]]:
        counts_DD2 = counts_2D2.new_empty(self.num_ranks, self.num_ranks, 2)
        _gather_single(counts_DD2.view(-1, 2), counts_2D2[0], group=self._group)
        counts, rank = OnHost(counts_DD2), self._group.rank()

        def wait() -> tuple[list[list[Count]], list[Count]]:
            by_sender = counts.wait().tolist()
            return by_sender, [sent[rank] for sent in by_sender]

        return wait

    @override
    def find_splits(self, by_sender: list[list[Count]], received: list[Count], packed_SW: Tensor) -> RowMatrix:
        rows_DD = tuple(tuple(rows & COUNT for rows, _ in sent) for sent in by_sender)
        slots, matrix = self._slots, RowMatrix.of(self._group.rank(), rows_DD, fits=True)
        needed = matrix.largest * packed_SW.shape[1] * packed_SW.itemsize  # other rows are no wider
        if needed > slots.capacity and slots.refused is None:
            slots.grow(self._group, packed_SW.device, max(needed, packed_SW.nbytes))
            if slots.refused is not None:
                rank_zero_warn(f"Some rows travel to experts and back as collectives, not by copies: {slots.refused}.")
        return replace(matrix, fits=slots.ring is not None and needed <= slots.capacity)

    @override
    def room(self, plan: AllToAllPlan, rows_NH: Tensor) -> Callable[[], Tensor] | None:
        splits = cast(RowMatrix, plan.splits)
        if not splits.fits:
            return None
        shape = rows_NH.shape[0], rows_NH.shape[1]
        return partial(self.new_rows, shape, rows_NH.dtype, rows_NH.device, splits)

    @override
    def exchange(self, rows: Tensor, splits: Splits, hop: str) -> tuple[Tensor, Pending]:
        assert isinstance(splits, RowMatrix)
        ring = self._slots.ring
        if ring is None or not splits.fits:
            # Rows that were written into a slot must leave it: the next ones are.
            return super().exchange(rows if ring is None else rows.clone(), splits, hop)
        self._watch(rows.device)
        received = rows.new_empty(sum(splits.recv), *rows.shape[1:])
        transfer = ring.start(rows.contiguous(), received, splits.pieces)
        exchange = self._progress.started(self.layer, hop, transfer, unaided=True)
        return received, self._pending(received, transfer, exchange)

    def _watch(self, device: torch.device) -> None:
        """Has somebody notice when a rank has died: a stream that waits for it does not say so."""
        timeout = self._group._get_backend(device).options._timeout
        self._progress.watch(dist.get_rank(), timeout.total_seconds())
