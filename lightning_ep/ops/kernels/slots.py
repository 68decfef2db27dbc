"""Numbers of slots ``[N, K]`` that lie with gaps between their rows, as they travel behind those of an exchange."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def slot_offset(slot, stride, TOP_K: tl.constexpr):
    """Where the number of a slot lies; slots are numbered row by row."""
    return (slot // TOP_K).to(tl.int64) * stride + slot % TOP_K


def with_unit_stride(rows: Tensor) -> Tensor:
    """The same rows, each without gaps inside."""
    return rows if rows.stride(1) == 1 else rows.contiguous()
