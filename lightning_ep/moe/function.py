"""The MoE body: the one autograd Function that orders dispatch, local experts and combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ep.moe.dispatch import Dispatcher, DispatchPlan
from lightning_ep.moe.master_weights import CallWeights, MasterWeights
from lightning_ep.ops.local_experts import LocalExperts


def moe_forward(
    dispatcher: Dispatcher[Any],
    experts: LocalExperts,
    hidden_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    params: Sequence[Tensor],
    leave: Callable[[Tensor], Callable[[], Tensor] | None] | None = None,
    masters: MasterWeights | None = None,
) -> Tensor:
    """Sends tokens to the ranks of their experts, runs the experts and brings the weighted sums back.

    Every rank of the EP group must call it, with any number of tokens, zero included.

    Args:
        dispatcher: How rows travel.
        experts: The experts of this rank.
        hidden_TH: Tokens of this rank, ``[T, H]``.
        ids_TK: int64 ``[T, K]``, global expert ids.
        weights_TK: ``[T, K]``, routing weights.
        params: Parameters of the experts, of which this rank computes with its part, in the dtype of ``hidden_TH``;
            their gradients sum over the tokens of all ranks of the EP group.
        leave: Called with ``hidden_TH`` if there will be a backward. Where it returns a function, no received row is
            kept: backward gets the hidden states from that function, sends the rows again and repeats the experts'
            forward as far as needed.
        masters: How parameters in another dtype are cast; by default twice, with gradients in their own dtype.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_TH``. Sums over a token's experts run in fp32 and in a fixed order.
    """
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden_TH, weights_TK, *params))
    later = leave(hidden_TH) if needs_grad and leave is not None else None
    computed = (masters or MasterWeights()).begin_call(params, hidden_TH.dtype, hidden_TH.shape[0], needs_grad)
    hop = "dispatch, forward" if torch.is_grad_enabled() else "dispatch, forward without gradients"
    return _MoE.apply(dispatcher, experts, computed, needs_grad, later, hop, hidden_TH, ids_TK, weights_TK, *params)


class _MoE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dispatcher: Dispatcher[Any],
        experts: LocalExperts,
        computed: CallWeights,
        needs_grad: bool,
        later: Callable[[], Tensor] | None,
        hop: str,
        hidden_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        *params: Tensor,
    ) -> Tensor:
        routed = dispatcher.route(ids_TK, weights_TK, hidden_TH, hop)
        computed.begin_forward()  # casts while the host waits for counts
        plan, rows = routed()
        del routed  # and the rows that it has packed
        local = computed.for_forward()  # and while the rows travel
        saved = None
        with dispatcher.explains_out_of_memory(lambda: dispatcher.describe(plan)):
            out_NH = rows_NH = rows.wait()
            if needs_grad and (later is not None or not experts.keeps_rows):
                plan = plan.without_rows()
            if plan.num_pairs > 0:
                keep = needs_grad and later is None
                routing = plan.ids_NK, plan.weights_NK, plan.num_pairs
                out_NH, saved = experts.forward(rows_NH, *routing, local, keep)
            out = dispatcher.combine(plan, out_NH, "combine, forward")
        if needs_grad:
            # Plain attributes, outside saved-tensor hooks: under activation checkpointing the routing and the
            # exchanges of this call must not be repeated (docs/reference/architecture.md, a token's walk).
            ctx.dispatcher, ctx.experts, ctx.plan, ctx.saved, ctx.computed = dispatcher, experts, plan, saved, computed
            ctx.later, ctx.weights_dtype = later, weights_TK.dtype
        return out.wait()

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # before the engine comes to weights that FSDP has let go of, and crashes
            raise RuntimeError(
                "create_graph=True asks for gradients of gradients, which MoE layers and FSDP2 do not have. Use "
                "gradients of the first order (create_graph=False), or finite differences."
            )
        if ctx.plan is None:
            raise RuntimeError(
                "Trying to run backward through a MoE layer a second time. Its tensors are freed by the first, also "
                "with retain_graph=True; sum the losses before calling backward, or run the forward again."
            )
        plan, saved, computed, later = ctx.plan, ctx.saved, ctx.computed, ctx.later
        ctx.plan = ctx.saved = ctx.computed = ctx.later = None
        trained = ctx.needs_input_grad[-len(computed.params) :]
        with ctx.dispatcher.explains_out_of_memory(lambda: ctx.dispatcher.describe(plan)):
            grads = _backward(ctx.dispatcher, ctx.experts, plan, saved, computed, later, trained, grad_TH)
        grad_hidden_TH, grad_weights_TK, grad_params = grads
        grad_weights_TK = grad_weights_TK.to(ctx.weights_dtype)
        return None, None, None, None, None, None, grad_hidden_TH, None, grad_weights_TK, *grad_params


def _backward(
    dispatcher: Dispatcher[Any],
    experts: LocalExperts,
    plan: DispatchPlan,
    saved: Any,
    computed: CallWeights,
    later: Callable[[], Tensor] | None,
    trained: Sequence[bool],
    grad_TH: Tensor,
) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
    """Gradients of the tokens, of their routing weights, and of the parameters that are ``trained``."""
    grad_rows = dispatcher.dispatch(plan, grad_TH, "combine, backward")
    # The layer is recomputed up to here under the exchange of their gradients, and its rows travel under what the
    # experts make of these alone.
    rows = dispatcher.dispatch(plan, later(), "dispatch, recomputed") if later is not None else None
    local = computed.for_backward() if plan.num_pairs > 0 else []  # casts while the gradients travel
    if plan.num_pairs > 0 and grad_rows.travels:
        saved = experts.prepare_backward(saved, trained)
    grad_NH = grad_rows.wait()
    if plan.num_pairs > 0:
        again = None if rows is None else rows.wait
        grad_rows_NH, grad_weights_NK, saved = experts.backward_rows(saved, local, grad_NH, again)
        del local, rows, again, grad_NH, grad_rows  # memory for the gradients of the parameters
    else:
        if rows is not None:
            rows.wait()
        grad_rows_NH, grad_weights_NK = grad_NH, torch.zeros_like(plan.weights_NK)
    # Gradients of rows travel home under the weight-gradient GEMMs.
    grad_hidden = dispatcher.combine(plan, grad_rows_NH, "dispatch, backward")
    grad_weights = dispatcher.combine_slots(plan, grad_weights_NK, "dispatch of routing weights, backward")
    grad_params: Sequence[Tensor | None]
    if not any(trained):
        grad_params = [None] * len(computed.params)  # frozen: a third of the GEMMs, and memory of a whole layer
    elif plan.num_pairs > 0:
        grad_params = computed.gradients(experts.backward_params(saved, computed.gradient_dtypes()))
    else:
        # No token came: the experts' gradients are zero, not missing, so that FSDP reduces on every rank.
        grad_params = computed.zero_gradients()
    return grad_hidden.wait(), grad_weights.wait(), grad_params
