"""The MoE body: the one autograd Function that orders dispatch, local experts and combine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ep.dispatch import Dispatcher
from lightning_ep.ops.local_experts import LocalExperts


def moe_forward(
    dispatcher: Dispatcher,
    experts: LocalExperts,
    hidden_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    params: Sequence[Tensor],
) -> Tensor:
    """Sends tokens to the ranks of their experts, runs the experts and brings the weighted sums back.

    Every rank of the EP group must call it, with any number of tokens, zero included.

    Args:
        dispatcher: How rows travel.
        experts: The experts of this rank.
        hidden_TH: Tokens of this rank, ``[T, H]``.
        ids_TK: int64 ``[T, K]``, global expert ids.
        weights_TK: ``[T, K]``, routing weights.
        params: Local parameters of the experts; their gradients sum over the tokens of all ranks of the EP group.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_TH``. Sums over a token's experts run in fp32 and in a fixed order.
    """
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_TH, weights_TK, *params))
    return _MoE.apply(dispatcher, experts, needs_grad, hidden_TH, ids_TK, weights_TK, *params)


class _MoE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dispatcher: Dispatcher,
        experts: LocalExperts,
        needs_grad: bool,
        hidden_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        *params: Tensor,
    ) -> Tensor:
        plan = dispatcher.plan(ids_TK)
        weights = dispatcher.dispatch_slots(plan, weights_TK, "dispatch of routing weights, forward")
        rows_NH = dispatcher.dispatch(plan, hidden_TH, "dispatch, forward").wait()
        rows_out_NH, saved = experts.forward(rows_NH, plan.ids_NK, weights.wait(), plan.num_pairs, params, needs_grad)
        out = dispatcher.combine(plan, rows_out_NH.to(hidden_TH.dtype), "combine, forward")
        if needs_grad:
            # Plain attributes, outside saved-tensor hooks: under activation checkpointing the routing and the
            # exchanges of this call must not be repeated (DESIGN, Recompute).
            ctx.dispatcher, ctx.experts, ctx.plan, ctx.saved = dispatcher, experts, plan, saved
            ctx.params_meta = [(p.shape, p.dtype) for p in params]
            ctx.weights_dtype = weights_TK.dtype
        return out.wait().to(hidden_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.plan is None:
            raise RuntimeError(
                "Trying to run backward through a MoE layer a second time. Its tensors are freed by the first; "
                "sum the losses before calling backward, or run the forward again."
            )
        dispatcher: Dispatcher = ctx.dispatcher
        plan, saved, experts = ctx.plan, ctx.saved, ctx.experts
        ctx.plan = ctx.saved = None
        grad_NH = dispatcher.dispatch(plan, grad_TH, "combine, backward").wait()
        if saved is None:
            # No received row has a local expert. The experts' gradients are zero, not missing, so that FSDP's
            # reduction runs on every rank.
            grad_rows_NH = torch.zeros_like(grad_NH)
            grad_weights_NK = grad_NH.new_zeros(plan.ids_NK.shape, dtype=ctx.weights_dtype)
            grad_params = tuple(
                torch.zeros(shape, dtype=dtype, device=grad_NH.device) for shape, dtype in ctx.params_meta
            )
        else:
            grad_rows_NH, grad_weights_NK, grad_params = experts.backward(saved, grad_NH)
        grad_hidden = dispatcher.combine(plan, grad_rows_NH.to(grad_TH.dtype), "dispatch, backward")
        grad_weights = dispatcher.combine_slots(plan, grad_weights_NK, "dispatch of routing weights, backward")
        return (
            None,
            None,
            None,
            grad_hidden.wait().to(grad_TH.dtype),
            None,
            grad_weights.wait().to(ctx.weights_dtype),
            *grad_params,
        )
