"""A tensor times a number that only the GPU knows. Twin: `torch.mul`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ep.ops.kernels import multiprocessors
from lightning_ep.ops.kernels.launch import Kernel

_BLOCK = 4096
_PROGRAMS_PER_SM = 8
_SCALED_BLOCK = 1024


@Kernel
def _scale_kernel(x, factor, num_elements, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        cols = tl.arange(0, BLOCK)
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, num_elements, step):
            mask = start + cols < num_elements
            values = tl.load(x + start + cols, mask=mask)
            tl.store(x + start + cols, (values.to(tl.float32) * by).to(values.dtype), mask=mask)


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """See `lightning_ep.ops.scale.scale_`; for one contiguous tensor."""
    # A few programs that walk through the tensor: there is little to launch where nothing is to be done.
    grid = (min(triton.cdiv(tensor.numel(), _BLOCK), multiprocessors(tensor.device) * _PROGRAMS_PER_SM),)
    _scale_kernel[grid](tensor, factor, tensor.numel(), _BLOCK, num_warps=8)


@Kernel
def _scaled_kernel(x, factor, out, num_elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < num_elements).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=at < num_elements)


def scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """See `lightning_ep.ops.scale.scaled`; of one contiguous tensor."""
    out = torch.empty_like(tensor, dtype=dtype)
    grid = (triton.cdiv(tensor.numel(), _SCALED_BLOCK),)
    _scaled_kernel[grid](tensor, factor, out, tensor.numel(), _SCALED_BLOCK, num_warps=4)
    return out
