"""What experts do between their projections, times the routing weight, on pairs in expert order; computed in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ep.ops import kernels
from lightning_ep.ops.expert_form import CUBIC, TWICE_ROOT, Activation, ExpertBias


def activate(
    h_PF: Tensor, weights_NK: Tensor, slot_P: Tensor, how: Activation, bias: ExpertBias | None = None
) -> Tensor:
    """The activation of every pair, times its routing weight.

    Args:
        h_PF: Projections: ``[P, 2 I]`` where ``how.gated``, else ``[P, I]``.
        weights_NK: ``[N, K]``, routing weights.
        slot_P: int32 ``[P]``, the place of each pair's weight in ``weights_NK``.
        how: The activation.
        bias: What is to be added to ``h_PF`` first.

    Returns:
        ``[P, I]`` in the dtype of ``h_PF``.
    """
    if kernels.runs_on(h_PF):
        from lightning_ep.ops.kernels import activation as triton_activation

        return triton_activation.activate(h_PF, weights_NK, slot_P, how, bias)
    return activate_twin(h_PF, weights_NK, slot_P, how, bias)


def activate_twin(
    h_PF: Tensor, weights_NK: Tensor, slot_P: Tensor, how: Activation, bias: ExpertBias | None = None
) -> Tensor:
    """Defines `activate`, in PyTorch."""
    gate_PI, up_PI = _clamped(*_parts(h_PF, slot_P, how, bias), how)
    weight_P1 = weights_NK.reshape(-1)[slot_P].to(gate_PI.dtype).unsqueeze(1)
    return (_function(gate_PI, how)[0] * up_PI * weight_P1).to(h_PF.dtype)


def activate_backward(
    grad_PI: Tensor,
    h_PF: Tensor,
    weights_NK: Tensor,
    slot_P: Tensor,
    how: Activation,
    bias: ExpertBias | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiates `activate` and repeats its result, which the weight gradient of the down projection needs.

    The routing weight scales the activation, so its gradient is the inner product of ``grad_PI`` with the unscaled
    activation; no expert output has to be kept for it.

    Args:
        grad_PI: ``[P, I]``, gradient of the result.
        h_PF: As in `activate`.
        weights_NK: As in `activate`.
        slot_P: As in `activate`.
        how: As in `activate`.
        bias: As in `activate`.

    Returns:
        The gradient of ``h_PF``, the result of `activate`, and the gradient of the routing weights ``[N, K]`` in their
        dtype, zero in empty slots.
    """
    if kernels.runs_on(grad_PI):
        from lightning_ep.ops.kernels import activation as triton_activation

        return triton_activation.activate_backward(grad_PI, h_PF, weights_NK, slot_P, how, bias)
    return activate_backward_twin(grad_PI, h_PF, weights_NK, slot_P, how, bias)


def activate_backward_twin(
    grad_PI: Tensor,
    h_PF: Tensor,
    weights_NK: Tensor,
    slot_P: Tensor,
    how: Activation,
    bias: ExpertBias | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Defines `activate_backward`, in PyTorch."""
    raw_gate_PI, raw_up_PI = _parts(h_PF, slot_P, how, bias)
    gate_PI, up_PI = _clamped(raw_gate_PI, raw_up_PI, how)
    weight_P1 = weights_NK.reshape(-1)[slot_P].to(gate_PI.dtype).unsqueeze(1)
    value_PI, slope_PI = _function(gate_PI, how)
    grad = grad_PI.to(gate_PI.dtype)
    grad_weights = torch.zeros(weights_NK.numel(), dtype=gate_PI.dtype, device=h_PF.device)
    grad_weights[slot_P] = (grad * value_PI * up_PI).sum(1)
    grad = grad * weight_P1
    grad_gate_PI, grad_up_PI = grad * up_PI * slope_PI, grad * value_PI
    if how.limit is not None:
        grad_gate_PI = grad_gate_PI.masked_fill(raw_gate_PI > how.limit, 0)
        grad_up_PI = grad_up_PI.masked_fill(raw_up_PI.abs() > how.limit, 0)
    if not how.gated:
        grad_h_PF = grad_gate_PI
    elif how.interleaved:
        grad_h_PF = torch.stack([grad_gate_PI, grad_up_PI], dim=2).flatten(1)
    else:
        grad_h_PF = torch.cat([grad_gate_PI, grad_up_PI], dim=1)
    out_PI = (value_PI * up_PI * weight_P1).to(h_PF.dtype)
    return grad_h_PF.to(h_PF.dtype), out_PI, grad_weights.view_as(weights_NK).to(weights_NK.dtype)


def _parts(h_PF: Tensor, slot_P: Tensor, how: Activation, bias: ExpertBias | None) -> tuple[Tensor, Tensor]:
    """Gate and up, the latter ones where nothing is gated."""
    h = h_PF.to(torch.promote_types(h_PF.dtype, torch.float32))
    if bias is not None:
        h = h + bias.bias_EF.to(h.dtype)[bias.ids_NK.reshape(-1)[slot_P].long()]
    if not how.gated:
        return h, torch.ones_like(h)
    return (h[:, ::2], h[:, 1::2]) if how.interleaved else h.tensor_split(2, dim=1)  # type: ignore[return-value]


def _clamped(gate_PI: Tensor, up_PI: Tensor, how: Activation) -> tuple[Tensor, Tensor]:
    if how.limit is not None:
        gate_PI = gate_PI.clamp(max=how.limit)
    if not how.gated:
        return gate_PI, up_PI
    if how.limit is not None:
        up_PI = up_PI.clamp(-how.limit, how.limit)
    return gate_PI, up_PI + how.up_offset


def _function(x: Tensor, how: Activation) -> tuple[Tensor, Tensor]:
    """The value, and its derivative."""
    if how.function == "relu2":
        return F.relu(x).square(), 2 * F.relu(x)
    if how.function == "silu":
        sigmoid, slope = torch.sigmoid(how.alpha * x), how.alpha
        return x * sigmoid, sigmoid + x * sigmoid * slope * (1 - sigmoid)
    sigmoid = torch.sigmoid(TWICE_ROOT * (x + CUBIC * x**3))
    return x * sigmoid, sigmoid + x * sigmoid * TWICE_ROOT * (1 + 3 * CUBIC * x * x) * (1 - sigmoid)
