"""One rank of a job that has many, alone: all of its arithmetic, copies and launches, and no network."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def start(ranks: int) -> None:
    """Joins a process group of ``ranks``, of which this process is rank 0 and the others do not exist.

    torch's fake group returns at once. What it is to receive is a copy of what this rank sends, as if every peer had
    the same weights and tokens: numbers stay finite, splits agree, and every expert-parallel rank gets equally many
    rows. Sums over ranks are this rank's part.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    new_group = dist.new_group

    @functools.wraps(new_group)
    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": "fake"})  # gloo's would look for its peers

    dist.new_group = fake_group
    dist.all_to_all_single = _all_to_all_single  # torch 2.13 copies as if all splits were equal, 2.11 nothing
    dist.reduce_scatter_tensor = _reduce_scatter_tensor  # 2.11 copies nothing; 2.13 calls another function


def _all_to_all_single(output: Tensor, input: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
    output.copy_(input)
    return torch._C._distributed_c10d.FakeWork() if async_op else None


def _reduce_scatter_tensor(output: Tensor, input: Tensor, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
    output.copy_(input.reshape(-1)[: output.numel()].view_as(output))
    return torch._C._distributed_c10d.FakeWork() if async_op else None
