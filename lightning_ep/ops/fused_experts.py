"""Experts as four grouped GEMMs and the glue between them, saving little for backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_ep.ops.activation import activate, activate_backward
from lightning_ep.ops.expert_form import ExpertBias, ExpertForm
from lightning_ep.ops.grouped_mm import grouped_sum
from lightning_ep.ops.local_experts import LocalExperts
from lightning_ep.ops.low_rank import Adapter, ExpertWeight, LowRank, WeightGradients, split
from lightning_ep.ops.permute import ExpertOrder, expert_order, gather_sum

_SMALL = 1 / 8  # of the rows: what of an adapter's rank is kept of a forward that keeps no rows


class _Weights(NamedTuple):
    up: ExpertWeight
    down: ExpertWeight
    up_bias_EF: Tensor | None
    down_bias_EH: Tensor | None


class _Up(NamedTuple):
    rows_NH: Tensor
    h_PF: Tensor  # without the bias
    rows_PH: Tensor | None = None  # in expert order, once they are


class _Forward(NamedTuple):
    ids_NK: Tensor
    weights_NK: Tensor
    order: ExpertOrder
    up: _Up | None  # where it was kept
    low_up_PR: Tensor | None  # the rows of both projections in rank space, where these were kept
    low_down_PR: Tensor | None


class _Rows(NamedTuple):
    rows_NH: Tensor
    rows_PH: Tensor | None
    order: ExpertOrder
    act_PI: Tensor
    up: WeightGradients
    down: WeightGradients
    grad_down_bias_EH: Tensor | None


class FusedExperts(LocalExperts):
    """Experts of two projections with an activation between them, gated or not.

    The routing weight multiplies the activation, between the GEMMs: the down projection then needs no pass over its
    output but the sum per row, and the weight's gradient needs no expert output. Kept for backward are the received
    rows and the up projection's output; the activation and the permuted rows are computed again. The order of
    operations follows ScatterMoE (Tan et al., 2024) and torchtitan's grouped experts.

    Neither bias costs a pass over the pairs: that of the up projection is added where the activation reads, and those
    of a row's experts are added to its sum, as one small product of its routing weights with all experts' biases.

    Args:
        num_experts: Local experts.
        adapters: Those of weights 0 (up) and 1 (down), whose factors follow the experts' own parameters in calls.
        form: What the experts are; calls pass up and down weights, then the biases of both if there are any.
    """

    keeps_rows = True

    def __init__(self, num_experts: int, adapters: Sequence[Adapter] = (), form: ExpertForm | None = None) -> None:
        self._num_experts = num_experts
        self._adapters = tuple(adapters)
        self._form = form or ExpertForm()

    def _weights(self, params: Sequence[Tensor]) -> _Weights:
        own, beside = split(params, self._form.num_params, self._adapters)
        up, down = (self._weight(weight, low) for weight, low in zip(own[:2], beside[:2], strict=True))
        return _Weights(up, down, *(own[2:] or (None, None)))

    def _weight(self, weight: Tensor, low: LowRank | None) -> ExpertWeight:
        weight_EBA = weight.transpose(1, 2) if self._form.is_transposed else weight
        return ExpertWeight(weight_EBA, None if low is None else low.aligned())

    @override
    def forward(
        self,
        rows_NH: Tensor,
        ids_NK: Tensor,
        weights_NK: Tensor,
        num_pairs: int,
        params: Sequence[Tensor],
        keep: bool,
    ) -> tuple[Tensor, _Forward]:
        weights = self._weights(params)
        order = expert_order(ids_NK, self._num_experts, num_pairs)
        h_PF, low_up_PR = weights.up.forward(order.permute(rows_NH), order.offsets_E)
        bias = _up_bias(weights, ids_NK)
        act_PI = activate(h_PF, weights_NK, order.slot_P, self._form.activation, bias)
        out_PH, low_down_PR = weights.down.forward(act_PI, order.offsets_E)
        out_NH = gather_sum(out_PH, order.pair_NK, rows_NH.dtype)
        if weights.down_bias_EH is not None:
            out_NH.addmm_(self._weights_NE(ids_NK, weights_NK, rows_NH.dtype), weights.down_bias_EH)
        low = low_up_PR, low_down_PR
        if not keep and sum(rows_PR.numel() for rows_PR in low if rows_PR is not None) > _SMALL * rows_NH.numel():
            low = None, None
        return out_NH, _Forward(ids_NK, weights_NK, order, _Up(rows_NH, h_PF) if keep else None, *low)

    @override
    def prepare_backward(self, saved: _Forward, trained: Sequence[bool]) -> _Forward:
        if saved.up is None or not trained[0]:
            return saved
        # A sixth of a millisecond of 16,384 tokens, in which the gradient's exchange has the GPU to itself.
        return saved._replace(up=saved.up._replace(rows_PH=saved.order.permute(saved.up.rows_NH)))

    @override
    def backward_rows(
        self,
        saved: _Forward,
        params: Sequence[Tensor],
        grad_NH: Tensor,
        rows: Callable[[], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, _Rows]:
        weights = self._weights(params)
        ids_NK, weights_NK, order, up, low_up_PR, low_down_PR = saved
        grad_out_PH = order.permute(grad_NH)
        grad_act_PI, grad_low_down_PR = weights.down.backward_rows(grad_out_PH, order.offsets_E)
        if rows is not None:  # which travel until here
            rows_NH, rows_PH = rows(), None
            h_PF, low_up_PR = weights.up.forward(order.permute(rows_NH), order.offsets_E, low_up_PR)
        else:
            assert up is not None
            rows_NH, h_PF, rows_PH = up
        grad_h_PF, act_PI, grad_weights_NK = activate_backward(
            grad_act_PI, h_PF, weights_NK, order.slot_P, self._form.activation, _up_bias(weights, ids_NK)
        )
        grad_rows_PH, grad_low_up_PR = weights.up.backward_rows(grad_h_PF, order.offsets_E)
        grad_rows_NH = gather_sum(grad_rows_PH, order.pair_NK, grad_NH.dtype)
        if low_down_PR is None:
            low_down_PR = weights.down.project(act_PI, order.offsets_E)
        of_up = WeightGradients(grad_h_PF, low_up_PR, grad_low_up_PR)
        of_down = WeightGradients(grad_out_PH, low_down_PR, grad_low_down_PR)
        grad_down_bias_EH = None
        if weights.down_bias_EH is not None:
            grad_down_bias_EH = self._weights_NE(ids_NK, weights_NK, grad_NH.dtype).t() @ grad_NH
            grad_weights_NK += self._of_slots(grad_NH @ weights.down_bias_EH.t(), ids_NK)
        return grad_rows_NH, grad_weights_NK, _Rows(rows_NH, rows_PH, order, act_PI, of_up, of_down, grad_down_bias_EH)

    @override
    def backward_params(self, saved: _Rows, dtypes: Sequence[torch.dtype | None]) -> tuple[Tensor | None, ...]:
        rows_NH, rows_PH, order, act_PI, of_up, of_down, grad_down_bias_EH = saved
        own, of_factors = dtypes[: self._form.num_params], dtypes[self._form.num_params :]
        ends_E, on, transposed = order.offsets_E, self._adapters if of_factors else (), self._form.is_transposed
        factors = {a.weight: (a.rank, of_factors[2 * i], of_factors[2 * i + 1]) for i, a in enumerate(on)}
        # The gradients of rows are on their way home.
        grad_down, *beside_down = of_down.gradients(
            act_PI, ends_E, own[1], factors.get(1), transposed, beside_collective=True
        )
        # A GEMM takes these rows once more in expert order, which takes the memory of all of them.
        if own[0] is not None and rows_PH is None:
            rows_PH = order.permute(rows_NH)
        x_NH, row_P = (rows_NH, order.row_P) if rows_PH is None else (rows_PH, None)
        grad_up, *beside_up = of_up.gradients(x_NH, ends_E, own[0], factors.get(0), transposed, row_P)
        biases: list[Tensor | None] = []
        if grad_down_bias_EH is not None:
            of_up_bias, of_down_bias = own[2:]
            biases = [
                None if of_up_bias is None else grouped_sum(of_up.grad_PB, ends_E, of_up_bias),
                None if of_down_bias is None else grad_down_bias_EH.to(of_down_bias),
            ]
        beside = (beside_up, beside_down)
        return grad_up, grad_down, *biases, *(grad for a in on for grad in beside[a.weight])

    def _weights_NE(self, ids_NK: Tensor, weights_NK: Tensor, dtype: torch.dtype) -> Tensor:
        """Each row's routing weights by expert, zero for those that it does not go to."""
        by_expert = weights_NK.new_zeros(ids_NK.shape[0], self._num_experts + 1)  # the last is that of empty slots
        return by_expert.scatter_add_(1, ids_NK.long(), weights_NK)[:, :-1].to(dtype)

    def _of_slots(self, values_NE: Tensor, ids_NK: Tensor) -> Tensor:
        """What stands at each slot's expert, zero in empty slots."""
        empty_NK = ids_NK >= self._num_experts
        return values_NE.gather(1, ids_NK.long().clamp_max(self._num_experts - 1)).masked_fill_(empty_NK, 0)


def _up_bias(weights: _Weights, ids_NK: Tensor) -> ExpertBias | None:
    return None if weights.up_bias_EF is None else ExpertBias(weights.up_bias_EF, ids_NK)
