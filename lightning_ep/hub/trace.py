"""Where every element of a converted tensor comes from: conversions run on tensors that record it instead of data.

transformers describes the difference between a checkpoint's layout and the model's as operations on whole tensors
(stack the experts, concatenate gate and up, ...). Run on `Traced` tensors, the same operations yield boxes: which part
of which source tensor lands where. From these a rank reads (or writes) only what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_ep.distributed.shards import Region


class NotTraceableError(Exception):
    """An operation moves elements in a way that boxes cannot describe, or computes new ones."""


@dataclass(frozen=True)
class Piece:
    """A box of a source tensor and the box of the converted tensor that it fills.

    Attributes:
        key: Name of the source tensor.
        source: Where the box starts in the source, per source dimension.
        target: The box in the converted tensor.
        dims: For each dimension of the converted tensor the source dimension that it is, None for an inserted one of
            size 1. Source dimensions that do not occur have size 1.
    """

    key: str
    source: tuple[int, ...]
    target: Region
    dims: tuple[int | None, ...]

    def source_region(self) -> Region:
        """The box in the source tensor."""
        size = [1] * len(self.source)
        for dim, n in zip(self.dims, self.target.size, strict=True):
            if dim is not None:
                size[dim] = n
        return Region(self.source, tuple(size))

    def crop(self, region: Region) -> Piece | None:
        """The part of this piece that lies in ``region`` of the converted tensor; its target counts from there."""
        target = self.target.intersect(region)
        if target is None:
            return None
        source = list(self.source)
        for dim, new, old in zip(self.dims, target.start, self.target.start, strict=True):
            if dim is not None:
                source[dim] += new - old
        return replace(self, source=tuple(source), target=target.relative_to(region.start))

    def crop_source(self, region: Region) -> Piece | None:
        """The part of this piece that comes from ``region`` of the source tensor; its target stays where it is."""
        box = self.source_region()
        source = box.intersect(region)
        if source is None:
            return None
        start, size = list(self.target.start), list(self.target.size)
        for position, dim in enumerate(self.dims):
            if dim is not None:
                start[position] += source.start[dim] - box.start[dim]
                size[position] = source.size[dim]
        return replace(self, source=source.start, target=Region(tuple(start), tuple(size)))

    def arrange(self, tensor: Tensor) -> Tensor:
        """The source box's data as a view with the dimensions of the target box."""
        used = [dim for dim in self.dims if dim is not None]
        tensor = tensor.reshape([tensor.shape[dim] for dim in sorted(used)])
        order = sorted(used)
        tensor = tensor.permute([order.index(dim) for dim in used])
        for position, dim in enumerate(self.dims):
            if dim is None:
                tensor = tensor.unsqueeze(position)
        return tensor


class Traced(Tensor):
    """A tensor without data that records which pieces of which sources it consists of.

    Operations other than moving whole boxes around raise `NotTraceableError`.
    """

    pieces: tuple[Piece, ...]
    extent: tuple[int, ...]  # the shape; asking a tensor subclass for it is slow

    @classmethod
    def source(cls, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Traced:
        """The source tensor ``key`` itself."""
        dims = tuple(range(len(shape)))
        return cls.made_of((Piece(key, (0,) * len(shape), Region.whole(shape), dims),), shape, dtype)

    @classmethod
    def made_of(cls, pieces: Sequence[Piece], shape: Sequence[int], dtype: torch.dtype) -> Traced:
        """A tensor of these pieces."""
        traced = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(cls)
        traced.pieces, traced.extent = tuple(pieces), tuple(shape)
        return traced

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        rule = _RULES.get(name)
        if rule is not None:
            return rule(*args, **(kwargs or {}))
        if name in _METADATA:
            answer = super().__torch_function__(func, types, args, kwargs or {})
            if not isinstance(answer, Tensor):
                return answer
            name = "an attribute"  # .T, .real and the like are tensors
        raise NotTraceableError(name)


# Questions about shape and type, which the meta tensor underneath answers. `__get__` is an attribute: shape, ndim, ...
_METADATA = {"__get__", "size", "dim", "numel", "is_contiguous", "__len__", "stride", "is_floating_point"}


def _sources(tensors: Sequence[Traced]) -> str:
    return ", ".join(f"{t.pieces[0].key} {list(t.extent)}" for t in tensors[:4])


def _remake(tensor: Traced, pieces: Sequence[Piece], shape: Sequence[int]) -> Traced:
    return Traced.made_of(pieces, shape, tensor.dtype)


def _insert(values: Sequence[Any], position: int, value: Any) -> tuple[Any, ...]:
    return (*values[:position], value, *values[position:])


def _inserted(piece: Piece, dim: int, index: int) -> Piece:
    """A piece of a tensor that becomes slice ``index`` along a new dimension."""
    target = Region(_insert(piece.target.start, dim, index), _insert(piece.target.size, dim, 1))
    return Piece(piece.key, piece.source, target, _insert(piece.dims, dim, None))


def _unsqueeze(tensor: Traced, dim: int) -> Traced:
    return _stack([tensor], dim)


def _squeeze(tensor: Traced, dim: int) -> Traced:
    dim = dim % len(tensor.extent)
    if tensor.extent[dim] != 1:
        return tensor
    return _keep_dims(tensor, [d for d in range(len(tensor.extent)) if d != dim])


def _permute(tensor: Traced, *dims: Any) -> Traced:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims
    return _keep_dims(tensor, [dim % len(tensor.extent) for dim in order])


def _transpose(tensor: Traced, dim0: int, dim1: int) -> Traced:
    order = list(range(len(tensor.extent)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _keep_dims(tensor, order)


def _keep_dims(tensor: Traced, order: Sequence[int]) -> Traced:
    pieces = [
        replace(
            p,
            target=Region(tuple(p.target.start[d] for d in order), tuple(p.target.size[d] for d in order)),
            dims=tuple(p.dims[d] for d in order),
        )
        for p in tensor.pieces
    ]
    return _remake(tensor, pieces, [tensor.extent[d] for d in order])


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    dim = dim % len(tensors[0].extent)
    if len({(*t.extent[:dim], *t.extent[dim + 1 :]) for t in tensors}) != 1:
        raise ValueError(f"tensors of different shapes cannot be concatenated: {_sources(tensors)}")
    pieces, offset = [], 0
    for tensor in tensors:
        for piece in tensor.pieces:
            start = list(piece.target.start)
            start[dim] += offset
            pieces.append(replace(piece, target=Region(tuple(start), piece.target.size)))
        offset += tensor.extent[dim]
    return _remake(tensors[0], pieces, (*tensors[0].extent[:dim], offset, *tensors[0].extent[dim + 1 :]))


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    shape = tensors[0].extent
    if any(t.extent != shape for t in tensors):
        raise ValueError(f"tensors of different shapes cannot be stacked: {_sources(tensors)}")
    dim = dim % (len(shape) + 1)
    pieces = [_inserted(p, dim, index) for index, tensor in enumerate(tensors) for p in tensor.pieces]
    return _remake(tensors[0], pieces, _insert(shape, dim, len(tensors)))


def _narrow(tensor: Traced, dim: int, start: int, length: int) -> Traced:
    dim = dim % len(tensor.extent)
    shape = list(tensor.extent)
    shape[dim] = length
    box = Region(tuple(start if d == dim else 0 for d in range(len(tensor.extent))), tuple(shape))
    pieces = [piece for p in tensor.pieces if (piece := p.crop(box)) is not None]
    return _remake(tensor, pieces, shape)


def _split(tensor: Traced, sizes: int | Sequence[int], dim: int = 0) -> tuple[Traced, ...]:
    total = tensor.extent[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    if sum(sizes) != total:
        raise ValueError(f"{_sources([tensor])}: dimension {dim} cannot be split into {list(sizes)}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(_narrow(tensor, dim, start, size) for start, size in zip(starts, sizes, strict=True))


def _chunk(tensor: Traced, chunks: int, dim: int = 0) -> tuple[Traced, ...]:
    return _split(tensor, -(-tensor.extent[dim] // chunks), dim)


def _unbind(tensor: Traced, dim: int = 0) -> tuple[Traced, ...]:
    return tuple(_squeeze(part, dim) for part in _split(tensor, 1, dim))


def _reshape(tensor: Traced, *shape: Any) -> Traced:
    new = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
    if -1 in new:
        new[new.index(-1)] = tensor.numel() // -math.prod(new)
    if new != list(tensor.extent):
        raise NotTraceableError("reshape")
    return tensor


def _same(tensor: Traced, *args: Any, **kwargs: Any) -> Traced:
    return tensor


_RULES: dict[str, Callable[..., Any]] = {
    "cat": _cat,
    "chunk": _chunk,
    "clone": _same,
    "concat": _cat,
    "contiguous": _same,
    "narrow": _narrow,
    "permute": _permute,
    "reshape": _reshape,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "transpose": _transpose,
    "unbind": _unbind,
    "unsqueeze": _unsqueeze,
    "view": _reshape,
}
