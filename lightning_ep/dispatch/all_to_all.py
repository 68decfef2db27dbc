"""Rows travel by all-to-all with uneven splits, over NCCL or gloo."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_ep.dispatch.base import Dispatcher, Pending
from lightning_ep.dispatch.on_host import OnHost
from lightning_ep.dispatch.plan import DispatchPlan
from lightning_ep.dispatch.progress import Progress
from lightning_ep.ops.permute import gather_sum, permute
from lightning_ep.ops.routing import destinations, split_slots


@dataclass(frozen=True)
class AllToAllPlan(DispatchPlan):
    """Adds how this rank's tokens travel, in ``S`` rows that are numbered by destination, then by token.

    Attributes:
        row_TK: int64 ``[T, K]``, the sent row that carries each slot.
        first_TK: int32 ``[T, K]``, the same at the first slot of every (token, destination), -1 at the others.
        send_splits: Rows sent to each rank.
        recv_splits: Rows received from each rank.
    """

    row_TK: Tensor
    first_TK: Tensor
    send_splits: tuple[int, ...]
    recv_splits: tuple[int, ...]


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
    def route(self, ids_TK: Tensor, weights_TK: Tensor, x_TH: Tensor, hop: str) -> tuple[AllToAllPlan, Pending]:
        to = destinations(ids_TK, weights_TK, self.num_local_experts, self.num_ranks)
        received_D2 = torch.empty_like(to.counts_D2)
        with self._progress.blocking(self.layer, "exchange of counts"):
            dist.all_to_all_single(received_D2, to.counts_D2, group=self._group)
            counts = OnHost(torch.stack([to.counts_D2, received_D2]))
            # The rows are put in order before the host knows how many there are, so that the GPU has work meanwhile.
            rows_SH = permute(x_TH, to.first_TK, to.slots_S2K.shape[0])
            sent, received = counts.wait().tolist()
        send_splits = tuple(rows for rows, _ in sent)
        recv_splits = tuple(rows for rows, _ in received)
        num_rows = sum(send_splits)
        slots = self._exchange(
            to.slots_S2K[:num_rows], send_splits, recv_splits, "dispatch of expert ids and weights, forward"
        )
        num_pairs = sum(pairs for _, pairs in received)
        with self.explains_out_of_memory(lambda: _describe(num_rows, sum(recv_splits), num_pairs)):
            rows = self._exchange(rows_SH[:num_rows], send_splits, recv_splits, hop)
        ids_NK, weights_NK = split_slots(slots.wait())
        plan = AllToAllPlan(
            ids_NK=ids_NK,
            weights_NK=weights_NK,
            num_pairs=num_pairs,
            row_TK=to.row_TK,
            first_TK=to.first_TK,
            send_splits=send_splits,
            recv_splits=recv_splits,
        )
        return plan, rows

    def _exchange(self, rows: Tensor, in_splits: tuple[int, ...], out_splits: tuple[int, ...], hop: str) -> Pending:
        received = rows.new_empty(sum(out_splits), *rows.shape[1:])
        work = dist.all_to_all_single(
            received, rows.contiguous(), list(out_splits), list(in_splits), group=self._group, async_op=True
        )
        exchange = self._progress.started(self.layer, hop, work)

        def finish() -> Tensor:
            with self._progress.blocking(self.layer, hop):
                work.wait()
            exchange.waited(received.is_cuda)
            return received

        return Pending(finish)

    @override
    def dispatch(self, plan: AllToAllPlan, x_TH: Tensor, hop: str) -> Pending:
        rows_SH = permute(x_TH, plan.first_TK, sum(plan.send_splits))
        return self._exchange(rows_SH, plan.send_splits, plan.recv_splits, hop)

    @override
    def combine(self, plan: AllToAllPlan, rows_NH: Tensor, hop: str) -> Pending:
        pending = self._exchange(rows_NH, plan.recv_splits, plan.send_splits, hop)
        return Pending(lambda: gather_sum(pending.wait(), plan.first_TK, rows_NH.dtype))

    @override
    def combine_slots(self, plan: AllToAllPlan, values_NK: Tensor, hop: str) -> Pending:
        pending = self._exchange(values_NK, plan.recv_splits, plan.send_splits, hop)
        return Pending(lambda: pending.wait().gather(0, plan.row_TK))

    @override
    def describe(self, plan: AllToAllPlan) -> str:
        return _describe(sum(plan.send_splits), sum(plan.recv_splits), plan.num_pairs)


def _describe(sent: int, received: int, pairs: int) -> str:
    return (
        f"rank {dist.get_rank()} receives {received:,} rows with {pairs:,} (row, expert) pairs and sends {sent:,} rows"
    )
