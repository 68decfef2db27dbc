"""SwiGLU experts as four grouped GEMMs and the glue between them, saving little for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ep.ops.activation import swiglu, swiglu_backward
from lightning_ep.ops.local_experts import LocalExperts
from lightning_ep.ops.low_rank import Adapter, ExpertWeight, WeightGradients, split
from lightning_ep.ops.permute import ExpertOrder, expert_order, gather_sum


class _Forward(NamedTuple):
    rows_NH: Tensor
    weights_NK: Tensor
    order: ExpertOrder
    h_PF: Tensor
    low_PR: Tensor | None  # of the up projection, which has it before its output is complete


class _Rows(NamedTuple):
    rows_NH: Tensor
    order: ExpertOrder
    act_PI: Tensor
    up: WeightGradients
    down: WeightGradients


class FusedExperts(LocalExperts):
    """Gated experts with ``gate_up_proj [E, 2 I, H]``, ``down_proj [E, H, I]``, SiLU and no bias.

    The routing weight multiplies the activation, between the GEMMs: the down projection then needs no pass over its
    output but the sum per row, and the weight's gradient needs no expert output. Kept for backward are the received
    rows and the up projection's output; the activation and the permuted rows are computed again. The order of
    operations follows ScatterMoE (Tan et al., 2024) and torchtitan's grouped experts.

    Args:
        num_experts: Local experts.
        adapters: Those of weights 0 (up) and 1 (down), whose factors follow the two weights in calls.
    """

    keeps_rows = True

    def __init__(self, num_experts: int, adapters: Sequence[Adapter] = ()) -> None:
        self._num_experts = num_experts
        self._adapters = tuple(adapters)

    def _weights(self, params: Sequence[Tensor]) -> tuple[ExpertWeight, ExpertWeight]:
        (up, down), beside = split(params, 2, self._adapters)
        beside_up, beside_down = (None if low is None else low.aligned() for low in beside)
        return ExpertWeight(up, beside_up), ExpertWeight(down, beside_down)

    @override
    def forward(
        self,
        rows_NH: Tensor,
        ids_NK: Tensor,
        weights_NK: Tensor,
        num_pairs: int,
        params: Sequence[Tensor],
        needs_grad: bool,
    ) -> tuple[Tensor, _Forward | None]:
        saved = self.recompute(rows_NH, ids_NK, weights_NK, num_pairs, params)
        order = saved.order
        act_PI = swiglu(saved.h_PF, weights_NK, order.slot_P)
        _, down = self._weights(params)
        out_PH, _ = down.forward(act_PI, order.offsets_E)
        out_NH = gather_sum(out_PH, order.pair_NK, rows_NH.dtype)
        return out_NH, saved if needs_grad else None

    @override
    def recompute(
        self, rows_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, num_pairs: int, params: Sequence[Tensor]
    ) -> _Forward:
        order = expert_order(ids_NK, self._num_experts, num_pairs)
        up, _ = self._weights(params)
        h_PF, low_PR = up.forward(order.permute(rows_NH), order.offsets_E)
        return _Forward(rows_NH, weights_NK, order, h_PF, low_PR)

    @override
    def backward_rows(self, saved: _Forward, params: Sequence[Tensor], grad_NH: Tensor) -> tuple[Tensor, Tensor, _Rows]:
        up, down = self._weights(params)
        rows_NH, weights_NK, order, h_PF, low_up_PR = saved
        grad_out_PH = order.permute(grad_NH)
        grad_act_PI, grad_low_down_PR = down.backward_rows(grad_out_PH, order.offsets_E)
        grad_h_PF, act_PI, grad_weights_NK = swiglu_backward(grad_act_PI, h_PF, weights_NK, order.slot_P)
        grad_rows_PH, grad_low_up_PR = up.backward_rows(grad_h_PF, order.offsets_E)
        grad_rows_NH = gather_sum(grad_rows_PH, order.pair_NK, rows_NH.dtype)
        low_down_PR = down.project(act_PI, order.offsets_E)
        of_up = WeightGradients(grad_h_PF, low_up_PR, grad_low_up_PR)
        of_down = WeightGradients(grad_out_PH, low_down_PR, grad_low_down_PR)
        return grad_rows_NH, grad_weights_NK, _Rows(rows_NH, order, act_PI, of_up, of_down)

    @override
    def backward_params(self, saved: _Rows, dtypes: Sequence[torch.dtype | None]) -> tuple[Tensor | None, ...]:
        rows_NH, order, act_PI, of_up, of_down = saved
        ends_E, on = order.offsets_E, self._adapters if len(dtypes) > 2 else ()
        factors = {a.weight: (a.rank, dtypes[2 + 2 * i], dtypes[3 + 2 * i]) for i, a in enumerate(on)}
        grad_down_EHI, *beside_down = of_down.gradients(act_PI, ends_E, dtypes[1], factors.get(1))
        # These rows once more in expert order, which takes the memory of all of them.
        needed = dtypes[0] is not None or 0 in factors
        x_PH = order.permute(rows_NH) if needed else rows_NH
        grad_up_EFH, *beside_up = of_up.gradients(x_PH, ends_E, dtypes[0], factors.get(0))
        beside = (beside_up, beside_down)
        return grad_up_EFH, grad_down_EHI, *(grad for a in on for grad in beside[a.weight])
