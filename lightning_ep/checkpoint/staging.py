"""Copies of tensors in host memory, so that training goes on while they are written."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

_ALIGNMENT = 64


class HostBuffer:
    """One piece of host memory that is kept and used again: page-locked where the tensors are on a GPU.

    It is as large as what a rank saves. Page-locking is slow, so the first copy takes longer than the others.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies tensors of any device; returns when the copies are complete.

        The copies are valid until the next call.
        """
        offsets, end = {}, 0
        for name, tensor in tensors.items():
            offsets[name] = end
            end += math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if end > self._buffer.numel():
            self._buffer = torch.empty(0, dtype=torch.uint8)  # let the old one go first
            self._buffer = torch.empty(end, dtype=torch.uint8)
            if on_gpu:
                _lock_pages(self._buffer)
        copies = {}
        for name, tensor in tensors.items():
            piece = self._buffer[offsets[name] : offsets[name] + tensor.nbytes]
            copies[name] = piece.view(tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies


def _lock_pages(buffer: Tensor) -> None:
    # Not `pin_memory=True`, which rounds up to a power of two.
    runtime = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if code != 0:
        rank_zero_warn(
            f"{buffer.nbytes / 2**30:.1f} GiB of host memory cannot be page-locked (CUDA error {code}; see "
            "`ulimit -l`): copies for asynchronous saves will be slower."
        )
        return
    weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
