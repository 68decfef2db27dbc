"""Rows travel by all-to-all with uneven splits, over NCCL or gloo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_ep.distributed.apart import meet_apart
from lightning_ep.distributed.host_copies import OnHost
from lightning_ep.distributed.progress import Exchange, Progress, Transfer
from lightning_ep.moe.dispatch.base import Dispatcher, DispatchPlan, Pending
from lightning_ep.moe.dispatch.packed import PackedRows
from lightning_ep.ops.permute import gather_sum, permute
from lightning_ep.ops.routing import destinations, split_slots, wire_dtypes

_COUNT_BITS = 32  # of the numbers that are exchanged; those above say which forward they are of
COUNT = 2**_COUNT_BITS - 1
Count = list[int]  # rows, and (row, expert) pairs


@dataclass(frozen=True)
class Splits:
    """How many rows go to each rank, and come from each, in one direction.

    Attributes:
        send: Rows sent to each rank.
        recv: Rows received from each rank.
    """

    send: tuple[int, ...]
    recv: tuple[int, ...]

    @property
    def back(self) -> Splits:
        """The other direction."""
        return Splits(self.recv, self.send)


@dataclass(frozen=True)
class AllToAllPlan(DispatchPlan):
    """Adds how this rank's tokens travel, in ``S`` rows that are numbered by destination, then by token.

    Attributes:
        row_TK: int64 ``[T, K]``, the sent row that carries each slot.
        first_TK: int32 ``[T, K]``, the same at the first slot of every (token, destination), -1 at the others.
        splits: How many rows dispatch sends and receives; combine has those of the way back.
    """

    row_TK: Tensor
    first_TK: Tensor
    splits: Splits

    @override
    def without_rows(self) -> AllToAllPlan:
        return replace(self, ids_NK=self.ids_NK.contiguous(), weights_NK=self.weights_NK.contiguous())


class AllToAllDispatcher(Dispatcher[AllToAllPlan]):
    """Sends one row per (token, destination rank) with `torch.distributed.all_to_all_single`.

    The design follows torchtitan's token dispatcher (a dispatch/combine pair with frozen metadata). Planning is the
    one place where the host waits: counts of both directions come over in a single copy, under the permutation of
    the rows.

    Args:
        num_experts: Experts of the layer over all ranks.
        group: The EP group.
        layer: Name of the layer, for messages.
        progress: Where this rank notes what it is waiting for.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup, layer: str, progress: Progress) -> None:
        super().__init__(num_experts, num_ranks=group.size(), layer=layer)
        self._group = group
        self._progress = progress

    @override
    def route(
        self, ids_TK: Tensor, weights_TK: Tensor, x_TH: Tensor, hop: str
    ) -> Callable[[], tuple[AllToAllPlan, Pending]]:
        num_tokens, top_k = ids_TK.shape
        packing = PackedRows(x_TH.shape[1], x_TH.dtype, 2 * top_k, wire_dtypes(weights_TK.dtype)[1])
        room = num_tokens * min(top_k, self.num_ranks)
        packed_SW = self.new_rows((room, packing.width), torch.int32, x_TH.device)
        slots_S2K = packing.numbers(packed_SW)
        to = destinations(ids_TK, weights_TK, self.num_local_experts, self.num_ranks, slots_S2K)
        number = self._progress.pass_number(self.layer, hop)
        if number:
            to.counts_2D2[0].add_(number << _COUNT_BITS)
        with self._progress.blocking(self.layer, "exchange of counts"):
            counts = self.exchange_counts(to.counts_2D2)
        # The rows are put in order before the host knows how many there are, so that the GPU has work meanwhile.
        permute(x_TH, to.first_TK, room, packing.rows(packed_SW))

        def send() -> tuple[AllToAllPlan, Pending]:
            with self._progress.blocking(self.layer, "exchange of counts"):
                by_sender, received = counts()
            if any(rows >> _COUNT_BITS != number for rows, _ in received):
                raise meet_apart(self._progress, dist.get_process_group_ranks(self._group))
            splits = self.find_splits(by_sender, received, packed_SW)
            num_pairs = sum(pairs & COUNT for _, pairs in received)
            with self.explains_out_of_memory(lambda: _describe(splits, num_pairs)):
                packed_NW, arrival = self.exchange(packed_SW[: sum(splits.send)], splits, hop)
            ids_NK, weights_NK = split_slots(packing.numbers(packed_NW))
            plan = AllToAllPlan(
                ids_NK=ids_NK,
                weights_NK=weights_NK,
                num_pairs=num_pairs,
                row_TK=to.row_TK,
                first_TK=to.first_TK,
                splits=splits,
            )
            return plan, Pending(lambda: packing.rows(arrival.wait()))

        return send

    def new_rows(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, splits: Splits | None = None
    ) -> Tensor:
        """Where rows are written that are sent next; their number is known if ``splits`` are."""
        return torch.empty(shape, dtype=dtype, device=device)

    def exchange_counts(self, counts_2D2: Tensor) -> Callable[[], tuple[list[list[Count]], list[Count]]]:
        """Starts the exchange of what `destinations` has counted.

        Returns:
            What waits for it, and gives what each rank sends to each (here of this rank alone), and what each sends to
            this one.
        """
        dist.all_to_all_single(counts_2D2[1], counts_2D2[0], group=self._group)
        counts = OnHost(counts_2D2)

        def wait() -> tuple[list[list[Count]], list[Count]]:
            sent, received = counts.wait().tolist()
            return [sent], received

        return wait

    def find_splits(self, by_sender: list[list[Count]], received: list[Count], packed_SW: Tensor) -> Splits:
        """The splits of counts, for rows as wide as ``packed_SW``."""
        (sent,) = by_sender
        return Splits(tuple(rows & COUNT for rows, _ in sent), tuple(rows & COUNT for rows, _ in received))

    def exchange(self, rows: Tensor, splits: Splits, hop: str) -> tuple[Tensor, Pending]:
        """Where rows will be, and what waits until they are."""
        received = rows.new_empty(sum(splits.recv), *rows.shape[1:])
        work = dist.all_to_all_single(
            received, rows.contiguous(), list(splits.recv), list(splits.send), group=self._group, async_op=True
        )
        return received, self._pending(received, work, self._progress.started(self.layer, hop, work))

    def _pending(self, received: Tensor, work: dist.Work | Transfer, exchange: Exchange) -> Pending:
        def finish() -> Tensor:
            with self._progress.blocking(self.layer, exchange.hop):
                work.wait()
            exchange.waited(received.is_cuda)
            return received

        return Pending(finish)

    @override
    def dispatch(self, plan: AllToAllPlan, x_TH: Tensor, hop: str) -> Pending:
        shape = sum(plan.splits.send), x_TH.shape[1]
        rows_SH = self.new_rows(shape, x_TH.dtype, x_TH.device, plan.splits)
        return self.exchange(permute(x_TH, plan.first_TK, shape[0], rows_SH), plan.splits, hop)[1]

    @override
    def combine(self, plan: AllToAllPlan, rows_NH: Tensor, hop: str) -> Pending:
        _, pending = self.exchange(rows_NH, plan.splits.back, hop)
        return Pending(lambda: gather_sum(pending.wait(), plan.first_TK, rows_NH.dtype))

    @override
    def combine_slots(self, plan: AllToAllPlan, values_NK: Tensor, hop: str) -> Pending:
        _, pending = self.exchange(values_NK, plan.splits.back, hop)
        return Pending(lambda: pending.wait().gather(0, plan.row_TK))

    @override
    def describe(self, plan: AllToAllPlan) -> str:
        return _describe(plan.splits, plan.num_pairs)


def _describe(splits: Splits, pairs: int) -> str:
    return (
        f"rank {dist.get_rank()} receives {sum(splits.recv):,} rows with {pairs:,} (row, expert) pairs and sends "
        f"{sum(splits.send):,} rows"
    )
