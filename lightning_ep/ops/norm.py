"""The sum of squares of many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ep.ops import kernels

_LARGE = 2**24  # elements


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements, added in at least fp32 within a tensor and in float64 across tensors.

    Args:
        tensors: At least one, of one dtype and on one device.

    Returns:
        0-dim, float64; not finite if an element is not, or if the sum of a tensor exceeds fp32.
    """
    large: list[Tensor] = []
    rest: list[Tensor] = []
    for tensor in tensors:
        # One launch of torch for many tensors; a kernel for each is worth the host only where memory takes longer.
        worth = tensor.numel() >= _LARGE and kernels.runs_on_large(tensor)
        (large if worth else rest).append(tensor)
    sums: list[Tensor] = []
    if large:
        from lightning_ep.ops.kernels import norm as triton_norm

        sums.append(triton_norm.sums_of_squares(large).double().sum())
    if rest:
        sums.append(sum_of_squares_twin(rest))
    return torch.stack(sums).sum()


def sum_of_squares_twin(tensors: Sequence[Tensor]) -> Tensor:
    """Defines `sum_of_squares`."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(list(tensors), 2.0, dtype=dtype)).double().square().sum()
