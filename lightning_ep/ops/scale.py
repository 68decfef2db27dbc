"""Many tensors times one number, which is mostly one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ep.ops import kernels


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies in place by a 0-dim tensor.

    Gradient clipping multiplies by one in most steps. Where there are kernels, the large tensors are then left alone,
    which the GPU finds out: the host does not wait for the factor.

    Args:
        tensors: Contiguous or not, on one device.
        factor: 0-dim, on the same device.
    """
    large: list[Tensor] = []
    rest: list[Tensor] = []
    for tensor in tensors:
        (large if kernels.runs_on_large(tensor, factor) else rest).append(tensor)
    if large:
        from lightning_ep.ops.kernels import scale as triton_scale

        for tensor in large:
            triton_scale.scale_(tensor, factor)
    if rest:
        torch._foreach_mul_(rest, factor)


def scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor times a number, in another dtype: rounded once, in one pass.

    Args:
        tensor: Contiguous or not, in at most fp32.
        factor: 0-dim, on the same device.
        dtype: Of the result.
    """
    if kernels.runs_on_large(tensor, factor):
        from lightning_ep.ops.kernels import scale as triton_scale

        return triton_scale.scaled(tensor, factor, dtype)
    return (tensor * factor).to(dtype)
