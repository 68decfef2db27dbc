"""Boxes inside tensors, and the box that this rank holds of a sharded parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard


@dataclass(frozen=True)
class Region:
    """An axis-aligned box: where it starts in the tensor and its size, per dimension."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Region:
        """The box that is all of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.size)

    def intersect(self, other: Region) -> Region | None:
        """The box in both, or None if there is no element in it."""
        start, size = [], []
        for a, n, b, m in zip(self.start, self.size, other.start, other.size, strict=True):
            first, end = max(a, b), min(a + n, b + m)
            if first >= end:
                return None
            start.append(first)
            size.append(end - first)
        return Region(tuple(start), tuple(size))

    def relative_to(self, origin: tuple[int, ...]) -> Region:
        """The same box, counted from ``origin``."""
        return Region(tuple(a - b for a, b in zip(self.start, origin, strict=True)), self.size)

    def of(self, tensor: Tensor) -> Tensor:
        """The view of ``tensor`` that this box is."""
        for dim, (start, size) in enumerate(zip(self.start, self.size, strict=True)):
            tensor = tensor.narrow(dim, start, size)
        return tensor


def local_region(tensor: Tensor) -> Region:
    """What this rank holds of ``tensor``, in global coordinates; all of it unless it is a DTensor.

    Shards are cut as DTensor and FSDP2 cut them: equal sizes rounded up, the last ones short or empty. Plain shards
    apply from the outer mesh dimension to the inner one; a ``_StridedShard``, which FSDP2 makes where a parameter was
    sharded before on the same dimension, cuts what those leave.

    Args:
        tensor: A parameter, whose mesh this rank is part of.

    Raises:
        ValueError: If a placement is a partial sum, which is no part of a tensor.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Region.whole(shape)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return Region((0,) * len(shape), (0,) * len(shape))
    start, size = [0] * len(shape), list(shape)
    cuts = list(zip(tensor.placements, tensor.device_mesh.shape, coordinate, strict=True))
    for placement, num_chunks, index in sorted(cuts, key=lambda cut: isinstance(cut[0], _StridedShard)):
        if placement.is_replicate():
            continue
        if placement.is_partial():
            raise ValueError(f"a tensor with placements {tensor.placements} is a partial sum, not a shard.")
        dim: int = placement.dim  # type: ignore[attr-defined]
        chunk = -(-size[dim] // num_chunks)
        offset = min(index * chunk, size[dim])
        start[dim] += offset
        size[dim] = min(chunk, size[dim] - offset)
    return Region(tuple(start), tuple(size))


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of ``tensor``, detached, sharing storage."""
    # Not `to_local()` or `detach()` of DTensor: on the host each is an operation, and optimizers ask in every step.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()


def in_memory_order_of(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor``, or a copy whose elements lie in memory as those of ``like``, of the same shape, do.

    Autograd promises it of gradients, but only looks at strides that a DTensor says it has. Fused optimizers read
    parameter and gradient in the order of memory, and do not ask: each element would get another one's update.
    """
    if tensor.stride() == like.stride():  # nearly always, and asked of every parameter in every step
        return tensor
    strides = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    if all(one == other for size, one, other in strides if size > 1):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor`` on the CPU, detached. Every rank of its mesh must call it."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().cpu()
    there: Any = tensor.detach().to(tensor.device_mesh.device_type)  # after `fit` Lightning has moved it to the CPU
    gathered: Tensor = there.full_tensor()
    return gathered.cpu()


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def as_gradient_of(local: Tensor, param: Tensor) -> Tensor:
    """The gradient of a parameter, sharded as it is, from this rank's part; in the part's dtype."""
    # Kernels of others differentiate transposed and broadcast weights, whose gradients have any strides.
    local = in_memory_order_of(local, local_tensor(param))
    if not isinstance(param, DTensor):
        return local
    spec = param._spec
    if local.dtype != param.dtype:
        assert spec.tensor_meta is not None
        meta = spec.tensor_meta._replace(dtype=local.dtype)
        spec = type(spec)(spec.mesh, spec.placements, tensor_meta=meta)
    # Not `from_local`: for the host it is an autograd function of its own, and this is asked twice per layer and step.
    return DTensor(local, spec, requires_grad=False)
