"""Triton kernels. Each has a plain PyTorch twin in the module of `lightning_ep.ops` of the same name, which defines it.

Import these modules only where a tensor is on a GPU: CPU builds of torch come without Triton.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LARGE = 2**20  # elements written; below, one launch of torch's for many tensors is worth more than a kernel for each


def runs_on(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors; the twins take every other device, and float64."""
    return all(t.is_cuda and t.dtype != torch.float64 for t in tensors)


def runs_on_large(tensor: Tensor, *others: Tensor) -> bool:
    """Whether a kernel for one contiguous tensor at a time takes this one, with what belongs to it, and is worth it."""
    tensors = (tensor, *others)
    return tensor.numel() >= LARGE and runs_on(*tensors) and all(t.is_contiguous() for t in tensors)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once; one in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether a GPU is one."""
    return torch.cuda.get_device_capability(device) == (9, 0)
