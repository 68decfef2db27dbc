"""SwiGLU experts as four grouped GEMMs and the glue between them, saving little for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ep.ops.activation import swiglu, swiglu_backward
from lightning_ep.ops.grouped_mm import grouped_mm, grouped_outer
from lightning_ep.ops.local_experts import LocalExperts
from lightning_ep.ops.permute import ExpertOrder, expert_order, gather_sum


class _Forward(NamedTuple):
    rows_NH: Tensor
    weights_NK: Tensor
    order: ExpertOrder
    h_PF: Tensor


class _Rows(NamedTuple):
    rows_NH: Tensor
    order: ExpertOrder
    act_PI: Tensor
    grad_out_PH: Tensor
    grad_h_PF: Tensor


class FusedExperts(LocalExperts):
    """Gated experts with ``gate_up_proj [E, 2 I, H]``, ``down_proj [E, H, I]``, SiLU and no bias.

    The routing weight multiplies the activation, between the GEMMs: the down projection then needs no pass over its
    output but the sum per row, and the weight's gradient needs no expert output. Kept for backward are the received
    rows and the up projection's output; the activation and the permuted rows are computed again. The order of
    operations follows ScatterMoE (Tan et al., 2024) and torchtitan's grouped experts.

    Args:
        num_experts: Local experts.
    """

    keeps_rows = True

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts

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
        _, _, order, h_PF = saved
        act_PI = swiglu(h_PF, weights_NK, order.slot_P)
        out_PH = grouped_mm(act_PI, params[1].transpose(1, 2), order.offsets_E)
        out_NH = gather_sum(out_PH, order.pair_NK, rows_NH.dtype)
        return out_NH, saved if needs_grad else None

    @override
    def recompute(
        self, rows_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, num_pairs: int, params: Sequence[Tensor]
    ) -> _Forward:
        order = expert_order(ids_NK, self._num_experts, num_pairs)
        h_PF = grouped_mm(order.permute(rows_NH), params[0].transpose(1, 2), order.offsets_E)
        return _Forward(rows_NH, weights_NK, order, h_PF)

    @override
    def backward_rows(self, saved: _Forward, params: Sequence[Tensor], grad_NH: Tensor) -> tuple[Tensor, Tensor, _Rows]:
        up_EFH, down_EHI = params
        rows_NH, weights_NK, order, h_PF = saved
        grad_out_PH = order.permute(grad_NH)
        grad_act_PI = grouped_mm(grad_out_PH, down_EHI, order.offsets_E)
        grad_h_PF, act_PI, grad_weights_NK = swiglu_backward(grad_act_PI, h_PF, weights_NK, order.slot_P)
        grad_rows_PH = grouped_mm(grad_h_PF, up_EFH, order.offsets_E)
        grad_rows_NH = gather_sum(grad_rows_PH, order.pair_NK, rows_NH.dtype)
        return grad_rows_NH, grad_weights_NK, _Rows(rows_NH, order, act_PI, grad_out_PH, grad_h_PF)

    @override
    def backward_params(self, saved: _Rows, dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
        rows_NH, order, act_PI, grad_out_PH, grad_h_PF = saved
        grad_down_EHI = grouped_outer(grad_out_PH, act_PI, order.offsets_E, dtypes[1])
        grad_up_EFH = grouped_outer(grad_h_PF, order.permute(rows_NH), order.offsets_E, dtypes[0])
        return grad_up_EFH, grad_down_EHI
