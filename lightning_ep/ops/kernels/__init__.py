"""Triton kernels. Each has a plain PyTorch twin in the module of `lightning_ep.ops` of the same name, which defines it.

Import these modules only where a tensor is on a GPU: CPU builds of torch come without Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor


def runs_on(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors; the twins take every other device, and float64."""
    return all(t.is_cuda and t.dtype != torch.float64 for t in tensors)
