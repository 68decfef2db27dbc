"""SwiGLU times routing weight, on pairs in expert order; sums and intermediate values in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ep.ops import kernels


def swiglu(h_PF: Tensor, weights_NK: Tensor, slot_P: Tensor) -> Tensor:
    """``silu(gate) * up * weight`` of every pair.

    Args:
        h_PF: ``[P, 2 I]``, gate and up projections side by side.
        weights_NK: ``[N, K]``, routing weights.
        slot_P: int32 ``[P]``, the place of each pair's weight in ``weights_NK``.

    Returns:
        ``[P, I]`` in the dtype of ``h_PF``.
    """
    if kernels.runs_on(h_PF):
        from lightning_ep.ops.kernels import activation as triton_activation

        return triton_activation.swiglu(h_PF, weights_NK, slot_P)
    return swiglu_twin(h_PF, weights_NK, slot_P)


def swiglu_twin(h_PF: Tensor, weights_NK: Tensor, slot_P: Tensor) -> Tensor:
    """Defines `swiglu`, in PyTorch."""
    accumulate = torch.promote_types(h_PF.dtype, torch.float32)
    gate_PI, up_PI = h_PF.to(accumulate).chunk(2, dim=1)
    weight_P1 = weights_NK.reshape(-1)[slot_P].to(accumulate).unsqueeze(1)
    return (F.silu(gate_PI) * up_PI * weight_P1).to(h_PF.dtype)


def swiglu_backward(grad_PI: Tensor, h_PF: Tensor, weights_NK: Tensor, slot_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiates `swiglu` and repeats its result, which the weight gradient of the down projection needs.

    The routing weight scales the activation, so its gradient is the inner product of ``grad_PI`` with the unscaled
    activation; no expert output has to be kept for it.

    Args:
        grad_PI: ``[P, I]``, gradient of the result.
        h_PF: As in `swiglu`.
        weights_NK: As in `swiglu`.
        slot_P: As in `swiglu`.

    Returns:
        The gradient of ``h_PF``, the result of `swiglu`, and the gradient of the routing weights ``[N, K]`` in their
        dtype, zero in empty slots.
    """
    if kernels.runs_on(grad_PI):
        from lightning_ep.ops.kernels import activation as triton_activation

        return triton_activation.swiglu_backward(grad_PI, h_PF, weights_NK, slot_P)
    return swiglu_backward_twin(grad_PI, h_PF, weights_NK, slot_P)


def swiglu_backward_twin(
    grad_PI: Tensor, h_PF: Tensor, weights_NK: Tensor, slot_P: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Defines `swiglu_backward`, in PyTorch."""
    accumulate = torch.promote_types(h_PF.dtype, torch.float32)
    gate_PI, up_PI = h_PF.to(accumulate).chunk(2, dim=1)
    weight_P1 = weights_NK.reshape(-1)[slot_P].to(accumulate).unsqueeze(1)
    sigmoid_PI = torch.sigmoid(gate_PI)
    silu_PI = gate_PI * sigmoid_PI
    grad = grad_PI.to(accumulate)
    grad_weights = torch.zeros(weights_NK.numel(), dtype=accumulate, device=h_PF.device)
    grad_weights[slot_P] = (grad * silu_PI * up_PI).sum(1)
    grad = grad * weight_P1
    grad_gate_PI = grad * up_PI * (sigmoid_PI + silu_PI * (1 - sigmoid_PI))
    grad_h_PF = torch.cat([grad_gate_PI, grad * silu_PI], dim=1).to(h_PF.dtype)
    out_PI = (silu_PI * up_PI * weight_P1).to(h_PF.dtype)
    return grad_h_PF, out_PI, grad_weights.view_as(weights_NK).to(weights_NK.dtype)
