"""Stochastic rounding to bf16, with random bits that are a function of what is rounded and not of who does it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A step of a parameter gets 64 bits from SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
# generators", 2014), whose n-th number is a bijection of seed + n * GOLDEN.
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# An element gets 32 bits from a hash of its index that these 64 are the key of: Wellons' triple32 (hash-prospector), a
# bijection found by search for the least bias. The kernel is bound by such operations: with SplitMix64 for each element
# it took twice the time of rounding to the nearest (H200). Hashes of two rounds are not enough: numbers whose indices
# are 2,048 apart are far from independent.
HASH_1, HASH_2, HASH_3 = 0xED5AD4BB, 0xAC4C1B51, 0x31848BAB
SPREAD = 0x9E3779B1  # odd, with bits all over: makes the third of an element's numbers of 16 bits from both others


class Elements(NamedTuple):
    """Which elements of a whole tensor a rank's part is, in rows.

    Element ``i`` of the part is ``start + i // width * stride + i % width`` of the whole, both in row-major order.

    Attributes:
        key: Of the random bits, one for each tensor that is trained; below 2 ** 63.
        start: Where the part begins.
        width: Elements of a row of the part.
        stride: Elements of the whole from one row of the part to the next.
    """

    key: int
    start: int
    width: int
    stride: int


def random_bits_twin(elements: Elements, count: int, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three numbers of 16 random bits for each of the ``count`` elements of a part, int64 ``[count]`` each.

    Any two of an element's are independent, the three together are not (they come from 32 bits). Elements of a tensor
    that are 2 ** 32 apart have the same.

    Args:
        elements: Which elements.
        count: How many.
        step: 0-dim, any dtype that holds whole numbers: other steps, other bits.
    """
    stream = _mix(elements.key + step.long() * _signed(GOLDEN))
    at = torch.arange(count, device=step.device)
    at = elements.start + at // elements.width * elements.stride + at % elements.width
    x = (at + stream) & _32_BITS
    x = ((x ^ (x >> 17)) * HASH_1) & _32_BITS
    x = ((x ^ (x >> 11) ^ ((stream >> 32) & _32_BITS)) * HASH_2) & _32_BITS
    x = ((x ^ (x >> 15)) * HASH_3) & _32_BITS
    x = x ^ (x >> 14)
    return x & 0xFFFF, x >> 16, ((x * SPREAD) & _32_BITS) >> 16


def round_stochastically_twin(x: Tensor, bits: Tensor) -> Tensor:
    """``x``, fp32, as one of its two neighbours in bf16, the nearer the likelier, so that the mean is ``x``.

    The lower 16 bits of an fp32 number are how far it is from the bf16 number below (in magnitude) to the one above, in
    65,536ths. Adding 16 random bits carries with exactly that probability. NaN stays NaN with bits of zero; others
    may carry into its sign.

    Args:
        x: fp32, any shape.
        bits: int64 of the same shape, from 0 to 65,535.
    """
    rounded = (x.view(torch.int32) + bits.int()) & ~0xFFFF
    return rounded.view(torch.float32).bfloat16()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(MIX_1)
    x = (x ^ _shifted(x, 27)) * _signed(MIX_2)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)  # torch's shift copies the sign


_32_BITS = 0xFFFFFFFF


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
