"""Many tensors times one number, which is mostly one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ep.ops import kernels

_LARGE = 2**20  # elements; below, one launch for many tensors is worth more than a pass that is left out


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies in place by a 0-dim tensor.

    Gradient clipping multiplies by one in most steps. Where there are kernels, the large tensors are then left alone,
    which the GPU finds out: the host does not wait for the factor.

    Args:
        tensors: Contiguous or not, on one device.
        factor: 0-dim, on the same device.
    """
    large = [t for t in tensors if kernels.runs_on(t, factor) and t.numel() >= _LARGE and t.is_contiguous()]
    if large:
        from lightning_ep.ops.kernels import scale as triton_scale

        for tensor in large:
            triton_scale.scale_(tensor, factor)
    skipped = {id(tensor) for tensor in large}
    if rest := [tensor for tensor in tensors if id(tensor) not in skipped]:
        torch._foreach_mul_(rest, factor)
