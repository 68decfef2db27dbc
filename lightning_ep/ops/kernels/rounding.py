"""Stochastic rounding inside of kernels. Twins: `ops.rounding`."""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_ep.ops import rounding

_GOLDEN = tl.constexpr(rounding.GOLDEN)
_MIX_1 = tl.constexpr(rounding.MIX_1)
_MIX_2 = tl.constexpr(rounding.MIX_2)


@triton.jit
def random_bits(key, step, at):
    """uint64 for each element ``at`` (int64) of the whole tensor; ``step`` is int64."""
    return _mix(_mix(key.to(tl.uint64) + step.to(tl.uint64) * _GOLDEN) + at.to(tl.uint64) * _GOLDEN)


@triton.jit
def round_stochastically(x, bits):
    """bf16; of ``bits`` the lowest 16 are taken."""
    raised = x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF).to(tl.uint32)
    rounded = (raised & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x).to(tl.bfloat16)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)
