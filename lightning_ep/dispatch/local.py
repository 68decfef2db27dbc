"""One rank holds every expert: nothing travels."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ep.dispatch.base import Dispatcher, Pending
from lightning_ep.dispatch.plan import DispatchPlan


class LocalDispatcher(Dispatcher):
    """The `Dispatcher` of an EP group of one rank: the received rows are the tokens, and no size needs the host."""

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts, num_ranks=1)

    @override
    def plan(self, ids_TK: Tensor) -> DispatchPlan:
        num_tokens, top_k = ids_TK.shape
        token_T = torch.arange(num_tokens, device=ids_TK.device)
        row_TK = token_T.unsqueeze(1).expand(num_tokens, top_k)
        return DispatchPlan(
            token_S=token_T,
            row_TK=row_TK,
            first_TK=row_TK,
            send_splits=(num_tokens,),
            recv_splits=(num_tokens,),
            ids_NK=ids_TK,
            num_pairs=num_tokens * top_k,
        )

    @override
    def dispatch(self, plan: DispatchPlan, x_TH: Tensor, hop: str) -> Pending:
        return Pending(lambda: x_TH)

    @override
    def combine(self, plan: DispatchPlan, rows_NH: Tensor, hop: str) -> Pending:
        return Pending(lambda: rows_NH)

    @override
    def dispatch_slots(self, plan: DispatchPlan, values_TK: Tensor, hop: str) -> Pending:
        return Pending(lambda: values_TK)

    @override
    def combine_slots(self, plan: DispatchPlan, values_NK: Tensor, hop: str) -> Pending:
        return Pending(lambda: values_NK)
