"""One rank holds every expert: nothing travels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from typing_extensions import override

from lightning_ep.moe.dispatch.base import Dispatcher, DispatchPlan, Pending


class LocalDispatcher(Dispatcher[DispatchPlan]):
    """The `Dispatcher` of an EP group of one rank: the received rows are the tokens, and no size needs the host."""

    def __init__(self, num_experts: int, layer: str = "experts") -> None:
        super().__init__(num_experts, num_ranks=1, layer=layer)

    @override
    def route(
        self, ids_TK: Tensor, weights_TK: Tensor, x_TH: Tensor, hop: str
    ) -> Callable[[], tuple[DispatchPlan, Pending]]:
        plan = DispatchPlan(ids_TK, weights_TK, num_pairs=ids_TK.numel())
        return lambda: (plan, self.dispatch(plan, x_TH, hop))

    @override
    def dispatch(self, plan: DispatchPlan, x_TH: Tensor, hop: str) -> Pending:
        return Pending(lambda: x_TH, travels=False)

    @override
    def combine(self, plan: DispatchPlan, rows_NH: Tensor, hop: str) -> Pending:
        return Pending(lambda: rows_NH, travels=False)

    @override
    def combine_slots(self, plan: DispatchPlan, values_NK: Tensor, hop: str) -> Pending:
        return Pending(lambda: values_NK, travels=False)

    @override
    def describe(self, plan: DispatchPlan) -> str:
        return f"{plan.num_pairs:,} (row, expert) pairs of {plan.ids_NK.shape[0]:,} tokens"
