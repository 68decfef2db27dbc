"""Stochastic rounding to bf16, with random bits that are a function of what is rounded and not of who does it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): its n-th number is a
# bijection of seed + n * GOLDEN, so that any of them costs two multiplications, without those before it.
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


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


def random_bits_twin(elements: Elements, count: int, step: Tensor) -> Tensor:
    """64 random bits for each of the ``count`` elements of a part, int64 ``[count]``.

    Args:
        elements: Which elements.
        count: How many.
        step: 0-dim, any dtype that holds whole numbers: other steps, other bits.
    """
    stream = _mix(elements.key + step.long() * _signed(GOLDEN))
    at = torch.arange(count, device=step.device)
    at = elements.start + at // elements.width * elements.stride + at % elements.width
    return _mix(stream + at * _signed(GOLDEN))


def round_stochastically_twin(x: Tensor, bits: Tensor) -> Tensor:
    """``x``, fp32, as one of its two neighbours in bf16, the nearer the likelier, so that the mean is ``x``.

    The lower 16 bits of an fp32 number are how far it is from the bf16 number below (in magnitude) to the one above, in
    65,536ths. Adding 16 random bits carries with exactly that probability. NaN stays NaN.

    Args:
        x: fp32, any shape.
        bits: int64 of the same shape, of which the lowest 16 bits are taken.
    """
    rounded = (x.view(torch.int32) + (bits & 0xFFFF).int()) & ~0xFFFF
    return torch.where(x.isnan(), x, rounded.view(torch.float32)).bfloat16()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(MIX_1)
    x = (x ^ _shifted(x, 27)) * _signed(MIX_2)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)  # torch's shift copies the sign


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
