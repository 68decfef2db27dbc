"""Which random bits of stochastic rounding belong to which element of a sharded parameter."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_ep.distributed.shards import Region, local_region
from lightning_ep.ops.adamw import Update
from lightning_ep.ops.rounding import Elements


class Streams:
    """Keys of the random bits of parameters, and where a rank's part of each lies."""

    def __init__(self) -> None:
        self._seed = 0
        self._names: dict[Tensor, str] = {}
        self._regions: dict[Tensor, Region] = {}

    def name(self, names: Mapping[str, Tensor], seed: int) -> None:
        """See `lightning_ep.AdamW.name_parameters`."""
        self._names, self._seed = {param: name for name, param in names.items()}, seed

    def key(self, param: Tensor, groups: list[dict[str, Any]]) -> int:
        """A function of seed and name, or of seed and position in the optimizer's groups if nobody has named it."""
        name = self._names.get(param) or _own_names(groups)[param]
        digest = hashlib.sha256(f"{self._seed}/rounding/{name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def region(self, param: Tensor) -> Region:
        """What this rank holds of it; computed once, since it takes the host longer than a launch."""
        if param not in self._regions:
            self._regions[param] = local_region(param)
        return self._regions[param]


def in_rows(
    update: Update, region: Region, shape: tuple[int, ...], key: int, start: int = 0
) -> Iterator[tuple[Update, Elements]]:
    """Cuts a box of a parameter into boxes whose elements are rows of it: one, unless it is cut in three dimensions.

    Args:
        update: Of the box.
        region: The box.
        shape: Of the parameter.
        key: Of its random bits.
        start: Where it begins itself, if it is a part of a larger one.
    """
    cut = max((dim for dim in range(1, len(shape)) if region.size[dim] != shape[dim]), default=0)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    if all(region.size[dim] == shape[dim] for dim in range(1, cut)):
        start += sum(first * stride for first, stride in zip(region.start, strides, strict=True))
        yield update, Elements(key, start, math.prod(region.size[cut:]), math.prod(shape[cut:]))
        return
    behind = Region(region.start[1:], region.size[1:])
    for index in range(region.size[0]):
        first = start + (region.start[0] + index) * strides[0]
        param, grad, exp_avg, exp_avg_sq = (tensor[index] for tensor in update[:-1])
        yield from in_rows(Update(param, grad, exp_avg, exp_avg_sq, update.step), behind, shape[1:], key, first)


def _own_names(groups: list[dict[str, Any]]) -> dict[Tensor, str]:
    params = [param for group in groups for param in group["params"]]
    names = [name for group in groups for name in group.get("param_names", [None] * len(group["params"]))]
    return {param: name or str(number) for number, (param, name) in enumerate(zip(params, names, strict=True))}
