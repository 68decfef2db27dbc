"""Rows and the numbers that belong to their slots, side by side in one tensor, so that they travel together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; kernels load and store that much at a time


@dataclass(frozen=True)
class PackedRows:
    """What lies where in rows of ``W`` int32, in which no check for NaNs finds any. Both parts have one unit stride.

    Attributes:
        hidden: ``H``, the elements of the row itself.
        dtype: Of these.
        slots: ``X``, the numbers behind them.
        slots_dtype: Of those.
    """

    hidden: int
    dtype: torch.dtype
    slots: int
    slots_dtype: torch.dtype

    @property
    def width(self) -> int:
        """``W``."""
        return (self._begin + _aligned(self.slots * self.slots_dtype.itemsize)) // torch.int32.itemsize

    def rows(self, packed_NW: Tensor) -> Tensor:
        """The rows, a view ``[N, H]``."""
        return packed_NW.view(self.dtype)[:, : self.hidden]

    def numbers(self, packed_NW: Tensor) -> Tensor:
        """What is behind them, a view ``[N, X]``."""
        begin = self._begin // self.slots_dtype.itemsize
        return packed_NW.view(self.slots_dtype)[:, begin : begin + self.slots]

    @property
    def _begin(self) -> int:
        return _aligned(self.hidden * self.dtype.itemsize)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
