"""Sums of squares at the speed of memory, in a fixed order. Twin: `ops.norm.sum_of_squares_twin`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from lightning_ep.ops.kernels import multiprocessors
from lightning_ep.ops.kernels.launch import Kernel

_BLOCK = 4096
_PROGRAMS_PER_SM = 16


@Kernel
def _sum_of_squares_kernel(x, sums, num_elements, BLOCK: tl.constexpr):
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    cols = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, num_elements, step):
        values = tl.load(x + start + cols, mask=start + cols < num_elements, other=0.0).to(tl.float32)
        total += values * values
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


def sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """fp32 ``[n]``, whose sum is that of the squares of all elements of contiguous tensors on one device."""
    device = tensors[0].device
    programs = multiprocessors(device) * _PROGRAMS_PER_SM
    sums = torch.empty(len(tensors), programs, dtype=torch.float32, device=device)
    for tensor, row in zip(tensors, sums, strict=True):
        _sum_of_squares_kernel[(programs,)](tensor, row, tensor.numel(), _BLOCK, num_warps=8)
    return sums.flatten()
