"""One step of AdamW in one pass over a tensor. Twins: `ops.adamw.adamw_twin_`, `ops.adamw.adamw_rounded_twin_`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ep.ops.kernels.launch import Kernel
from lightning_ep.ops.kernels.rounding import random_bits, random_stream, round_stochastically, third
from lightning_ep.ops.rounding import Elements

_BLOCK = 1024  # 4.1 TB/s of an H200, what a copy takes; 4,096 in eight warps 3.95, and 3.6 when rounding stochastically
_TILES = 2  # of a program that rounds stochastically, which is bound by arithmetic: the step's numbers serve both


@partial(Kernel, do_not_specialize=("key", "start", "width", "stride"))
def _adamw_kernel(
    param, grad, exp_avg, exp_avg_sq, step, factor,
    lr, decay, log_beta1, log_beta2, beta1, beta2, rest1, rest2, eps, num_elements,
    key, start, width, stride,
    HAS_FACTOR: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    # In fp64, as `count` makes it: 1 - 0.999 ** step loses four digits in fp32.
    count = tl.load(step).to(tl.float64)
    step_size = (lr / (1.0 - tl.exp(count * log_beta1))).to(tl.float32)
    correction = tl.sqrt(1.0 - tl.exp(count * log_beta2)).to(tl.float32)
    if HAS_FACTOR:
        scale = tl.load(factor).to(tl.float32)
    if ROUNDS:
        stream = random_stream(key, count.to(tl.int64))
        inverse = tl.div_rn(1.0, correction)
    for tile in range(TILES):
        first = (tl.program_id(0).to(tl.int64) * TILES + tile) * BLOCK
        at = first + tl.arange(0, BLOCK)
        mask = at < num_elements
        g = tl.load(grad + at, mask=mask).to(tl.float32)
        if HAS_FACTOR:
            g *= scale
        m = tl.load(exp_avg + at, mask=mask).to(tl.float32) * beta1 + g * rest1
        v = tl.load(exp_avg_sq + at, mask=mask).to(tl.float32) * beta2 + g * g * rest2
        p = tl.load(param + at, mask=mask).to(tl.float32)
        p -= decay * p  # not times 1 - decay: next to one, fp32 has no digits left for a decay of 1e-6
        if ROUNDS:
            p -= step_size * tl.div_rn(m, tl.sqrt_rn(v) * inverse + eps)
            whole = start.to(tl.uint32) + at.to(tl.uint32)
            if ROWS:  # one division of 64 bits for all of a block, and one of the width's bits for each element
                row = first // width
                column = (first - row * width).to(width.dtype) + tl.arange(0, BLOCK)
                row = row.to(tl.uint32) + (column // width).to(tl.uint32)
                whole = start.to(tl.uint32) + row * stride.to(tl.uint32) + (column % width).to(tl.uint32)
            bits = tl.where(p == p, random_bits(stream, whole), 0)  # NaN, of moments too, must not carry
            tl.store(param + at, round_stochastically(p, bits << 16, param.dtype.element_ty), mask=mask)
            tl.store(exp_avg + at, round_stochastically(m, bits, exp_avg.dtype.element_ty), mask=mask)
            tl.store(exp_avg_sq + at, round_stochastically(v, third(bits), exp_avg_sq.dtype.element_ty), mask=mask)
        else:
            p -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), correction) + eps)
            tl.store(param + at, p.to(param.dtype.element_ty), mask=mask)
            tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=mask)
            tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=mask)


def adamw_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, factor: Tensor | None,
    numbers: Sequence[float], rounds: Elements | None = None,
) -> None:  # fmt: skip
    """See `lightning_ep.ops.adamw.adamw_` and `adamw_rounded_`; one parameter, contiguous, and `Rule.numbers()`."""
    num_elements = param.numel()
    elements = rounds or Elements(0, 0, num_elements, 0)
    tiles = 1 if rounds is None else _TILES
    _adamw_kernel[(triton.cdiv(num_elements, tiles * _BLOCK),)](
        param, grad, exp_avg, exp_avg_sq, step, step if factor is None else factor,
        *numbers, num_elements,
        *elements, factor is not None, rounds is not None, elements.width < num_elements, _BLOCK, tiles,
        # Without fused multiplications every operation rounds as the twin's, so that CPUs and GPUs agree.
        num_warps=4, enable_fp_fusion=rounds is None,
    )  # fmt: skip
    torch.autograd.graph.increment_version(param)
