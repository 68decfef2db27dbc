"""Moving activations between the ranks of a tensor-parallel group; each backward is the transpose of its forward.

Written with functional collectives, so that compiled decoder layers contain them without a break.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_ops = torch.ops._c10d_functional


@dataclass(frozen=True)
class TensorGroup:
    """The ranks that share matrices, as compiled code can hold them."""

    name: str
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> TensorGroup:
        """The group of a 1-D mesh."""
        return cls(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())

    def share(self, length: int) -> int:
        """Rows of each rank when ``length`` rows are split; the last ranks' shares may contain padding."""
        return -(-length // self.size)


def _all_gather(x: Tensor, size: int, name: str) -> Tensor:
    gathered: Tensor = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), size, name))
    return gathered


def _reduce_scatter(x: Tensor, size: int, name: str) -> Tensor:
    scattered: Tensor = _ops.wait_tensor(_ops.reduce_scatter_tensor(x.contiguous(), "sum", size, name))
    return scattered


def _all_reduce(x: Tensor, name: str) -> Tensor:
    reduced: Tensor = _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", name))
    return reduced


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, name: str) -> Tensor:
        ctx.size, ctx.name = size, name
        return _all_gather(x, size, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grad, ctx.size, ctx.name), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, name: str) -> Tensor:
        ctx.size, ctx.name = size, name
        return _reduce_scatter(x, size, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grad, ctx.size, ctx.name), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return _all_reduce(x, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.name), None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.name), None


def all_reduce(x: Tensor, group: TensorGroup) -> Tensor:
    """The sum of all ranks' ``x``, on every rank."""
    return _AllReduce.apply(x, group.name)


def sum_gradients(x: Tensor, group: TensorGroup) -> Tensor:
    """``x`` itself, the same on all ranks; what they do with it differs, so that its gradients are summed."""
    return _SumGradients.apply(x, group.name)


def gather_rows(x_RH: Tensor, group: TensorGroup) -> Tensor:
    """All ranks' rows (the first dimension), in rank order."""
    return _AllGather.apply(x_RH, group.size, group.name)


def scatter_rows(x_RH: Tensor, group: TensorGroup) -> Tensor:
    """This rank's share of the rows of the sum of all ranks' ``x``; the transpose of `gather_rows`."""
    return _ReduceScatter.apply(x_RH, group.size, group.name)


def gather_features(x: Tensor, group: TensorGroup) -> Tensor:
    """``[..., N / size]`` of every rank to ``[..., N]``."""
    return torch.cat(_AllGather.apply(x.unsqueeze(0), group.size, group.name).unbind(0), dim=-1)


def split_features(x: Tensor, group: TensorGroup) -> Tensor:
    """This rank's ``[..., N / size]`` of what all ranks hold alike."""
    return x.chunk(group.size, dim=-1)[group.rank]


def gather_sequence(x_BCH: Tensor, group: TensorGroup, length: int) -> Tensor:
    """``[B, C, H]`` of every rank to ``[B, length, H]``; what `split_sequence` added is dropped."""
    batch, share, *rest = x_BCH.shape
    if group.share(length) != share:
        raise ValueError(
            f"this rank holds {share} positions of each sequence and attention is told {length} of them on "
            f"{group.size} tensor-parallel ranks: they do not belong together."
        )
    x_GBC = gather_rows(x_BCH, group).view(group.size, batch, share, *rest)
    return x_GBC.transpose(0, 1).reshape(batch, group.size * share, *rest)[:, :length]


def scatter_sequence(x_BSH: Tensor, group: TensorGroup) -> Tensor:
    """This rank's ``[B, C, H]`` of the sum of all ranks' ``[B, S, H]``; the transpose of `gather_sequence`."""
    padded = _padded(x_BSH, group)
    batch, length, *rest = padded.shape
    x_GBC = padded.view(batch, group.size, length // group.size, *rest).transpose(0, 1)
    return scatter_rows(x_GBC.reshape(group.size * batch, length // group.size, *rest), group)


def split_sequence(x_BSH: Tensor, group: TensorGroup) -> Tensor:
    """This rank's ``[B, C, H]``, C = ceil(S / size), of what all ranks hold alike; zeros fill the last shares."""
    share = group.share(x_BSH.shape[1])
    return _padded(x_BSH, group).narrow(1, group.rank * share, share)


def _padded(x_BSH: Tensor, group: TensorGroup) -> Tensor:
    missing = group.share(x_BSH.shape[1]) * group.size - x_BSH.shape[1]
    return F.pad(x_BSH, (0, 0) * (x_BSH.ndim - 2) + (0, missing)) if missing else x_BSH
