"""Rows travel by all-to-all with uneven splits, over NCCL or gloo."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_ep.dispatch.base import Dispatcher, Pending
from lightning_ep.dispatch.plan import DispatchPlan, destinations
from lightning_ep.dispatch.progress import Progress
from lightning_ep.ops.permute import gather_sum


class AllToAllDispatcher(Dispatcher):
    """Sends one row per (token, destination rank) with `torch.distributed.all_to_all_single`.

    The design follows torchtitan's token dispatcher (a dispatch/combine pair with frozen metadata). Planning is the
    one place where the host waits: counts of both directions come over in a single copy.

    Args:
        num_experts: Experts of the layer over all ranks.
        group: The EP group.
        layer: Name of the layer, for messages.
        progress: Where this rank notes what it is waiting for.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup, layer: str, progress: Progress) -> None:
        super().__init__(num_experts, num_ranks=group.size())
        self._group = group
        self._layer = layer
        self._progress = progress

    @override
    def plan(self, ids_TK: Tensor) -> DispatchPlan:
        target = destinations(ids_TK, self.num_local_experts, self.num_ranks)
        received_D2 = torch.empty_like(target.counts_D2)
        with self._progress.blocking(self._layer, "exchange of counts"):
            dist.all_to_all_single(received_D2, target.counts_D2, group=self._group)
            sent, received = torch.stack([target.counts_D2, received_D2]).tolist()
        send_splits = tuple(rows for rows, _ in sent)
        recv_splits = tuple(rows for rows, _ in received)
        token_S, rank_S = target.source_of_row(sum(send_splits))
        ids_SK = ids_TK[token_S] - (rank_S * self.num_local_experts).unsqueeze(1)
        elsewhere_SK = (ids_SK < 0) | (ids_SK >= self.num_local_experts)
        ids_SK = ids_SK.masked_fill_(elsewhere_SK, self.num_local_experts).to(torch.int32)
        ids_NK = self._exchange(ids_SK, send_splits, recv_splits, "dispatch of expert ids, forward").wait().long()
        return DispatchPlan(
            token_S=token_S,
            row_TK=target.row_TK,
            first_TK=target.first_TK,
            send_splits=send_splits,
            recv_splits=recv_splits,
            ids_NK=ids_NK,
            num_pairs=sum(pairs for _, pairs in received),
        )

    def _exchange(self, rows: Tensor, in_splits: tuple[int, ...], out_splits: tuple[int, ...], hop: str) -> Pending:
        received = rows.new_empty(sum(out_splits), *rows.shape[1:])
        work = dist.all_to_all_single(
            received, rows.contiguous(), list(out_splits), list(in_splits), group=self._group, async_op=True
        )
        self._progress.started(self._layer, hop, work)

        def finish() -> Tensor:
            with self._progress.blocking(self._layer, hop):
                work.wait()
            return received

        return Pending(finish)

    @override
    def dispatch(self, plan: DispatchPlan, x_TH: Tensor, hop: str) -> Pending:
        return self._exchange(x_TH[plan.token_S], plan.send_splits, plan.recv_splits, hop)

    @override
    def combine(self, plan: DispatchPlan, rows_NH: Tensor, hop: str) -> Pending:
        pending = self._exchange(rows_NH, plan.recv_splits, plan.send_splits, hop)
        return Pending(lambda: gather_sum(pending.wait(), plan.first_TK))

    @override
    def dispatch_slots(self, plan: DispatchPlan, values_TK: Tensor, hop: str) -> Pending:
        return self._exchange(values_TK[plan.token_S], plan.send_splits, plan.recv_splits, hop)

    @override
    def combine_slots(self, plan: DispatchPlan, values_NK: Tensor, hop: str) -> Pending:
        pending = self._exchange(values_NK, plan.recv_splits, plan.send_splits, hop)
        return Pending(lambda: pending.wait().gather(0, plan.row_TK))
