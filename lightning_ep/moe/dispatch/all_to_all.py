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
from lightning_ep.distributed.progress import Progress
from lightning_ep.moe.dispatch.base import Dispatcher, DispatchPlan, Pending
from lightning_ep.moe.dispatch.packed import PackedRows
from lightning_ep.ops.permute import gather_sum, permute
from lightning_ep.ops.routing import destinations, split_slots, wire_dtypes

_COUNT_BITS = 32  # of the numbers that are exchanged; those above say which forward they are of
COUNT = 2**_COUNT_BITS - 1


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
        packed_SW = x_TH.new_empty(room, packing.width, dtype=torch.int32)
        slots_S2K = packing.numbers(packed_SW)
        to = destinations(ids_TK, weights_TK, self.num_local_experts, self.num_ranks, slots_S2K)
        number = self._progress.pass_number(self.layer, hop)
        if number:
            to.counts_2D2[0].add_(number << _COUNT_BITS)
        with self._progress.blocking(self.layer, "exchange of counts"):
            dist.all_to_all_single(to.counts_2D2[1], to.counts_2D2[0], group=self._group)
        counts = OnHost(to.counts_2D2)
        # The rows are put in order before the host knows how many there are, so that the GPU has work meanwhile.
        permute(x_TH, to.first_TK, room, packing.rows(packed_SW))

        def send() -> tuple[AllToAllPlan, Pending]:
            with self._progress.blocking(self.layer, "exchange of counts"):
                sent, received = counts.wait().tolist()
            if any(rows >> _COUNT_BITS != number for rows, _ in received):
                raise meet_apart(self._progress, dist.get_process_group_ranks(self._group))
            splits = Splits(*(tuple(rows & COUNT for rows, _ in side) for side in (sent, received)))
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

    def exchange(self, rows: Tensor, splits: Splits, hop: str) -> tuple[Tensor, Pending]:
        """Where rows will be, and what waits until they are."""
        received = rows.new_empty(sum(splits.recv), *rows.shape[1:])
        work = dist.all_to_all_single(
            received, rows.contiguous(), list(splits.recv), list(splits.send), group=self._group, async_op=True
        )
        exchange = self._progress.started(self.layer, hop, work)

        def finish() -> Tensor:
            with self._progress.blocking(self.layer, hop):
                work.wait()
            exchange.waited(received.is_cuda)
            return received

        return received, Pending(finish)

    @override
    def dispatch(self, plan: AllToAllPlan, x_TH: Tensor, hop: str) -> Pending:
        rows_SH = permute(x_TH, plan.first_TK, sum(plan.splits.send))
        return self.exchange(rows_SH, plan.splits, hop)[1]

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
