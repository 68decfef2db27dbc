"""Stochastic rounding inside of kernels. Twins: `ops.rounding`."""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_ep.ops import rounding

_GOLDEN, _MIX_1, _MIX_2 = (tl.constexpr(n) for n in (rounding.GOLDEN, rounding.MIX_1, rounding.MIX_2))
_HASH_1, _HASH_2, _HASH_3 = (tl.constexpr(n) for n in (rounding.HASH_1, rounding.HASH_2, rounding.HASH_3))
_SPREAD = tl.constexpr(rounding.SPREAD)


@triton.jit
def random_stream(key, step):
    """uint64, for all elements; ``step`` is int64."""
    stream = key.to(tl.uint64) + step.to(tl.uint64) * _GOLDEN
    stream = (stream ^ (stream >> 30)) * _MIX_1
    stream = (stream ^ (stream >> 27)) * _MIX_2
    return stream ^ (stream >> 31)


@triton.jit
def random_bits(stream, at):
    """uint32 for each element ``at`` (uint32, the index in the whole tensor modulo 2 ** 32)."""
    x = at + stream.to(tl.uint32)
    x = (x ^ (x >> 17)) * _HASH_1
    x = (x ^ (x >> 11) ^ (stream >> 32).to(tl.uint32)) * _HASH_2
    x = (x ^ (x >> 15)) * _HASH_3
    return x ^ (x >> 14)


@triton.jit
def third(bits):
    """16 more bits, in the upper half as the second are; the first are the lower half."""
    return bits * _SPREAD


@triton.jit
def round_stochastically(x, bits, dtype: tl.constexpr):
    """``x`` in a dtype: if that is bf16 with the upper 16 of ``bits`` (uint32), otherwise as it is rounded anywhere."""
    if dtype == tl.bfloat16:
        raised = x.to(tl.uint32, bitcast=True) + (bits >> 16)
        return (raised >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
