"""How fast the links of a layout are: a timed all-gather and all-to-all in each dimension of its meshes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ep.distributed.agreement import from_all_ranks
from lightning_ep.distributed.gathers import gather_single
from lightning_ep.layout import Meshes
from lightning_ep.planner.devices import OF_NETWORK, find_device

# That a rank sends to all others together: on GPUs enough that starting to takes no part of the time.
_BYTES = {"cuda": 2**28, "cpu": 2**20}
_TIMES, _ROUNDS = 5, 4
_SLOW = 0.5  # of what is normal: less is a fault somewhere
# Of a link's rate, what this program reached between two H200 (450 GB/s): 231 to 241 and 267 to 277 GB/s.
_REACHED = {"all-gather": 236 / 450, "all-to-all": 271 / 450}


@dataclass(frozen=True)
class Link:
    """What one collective reached in one dimension of a mesh.

    Attributes:
        what: The dimension, its size, and the collective.
        rate: Bytes per second that the slowest rank sent.
        normal: What to expect of such GPUs; None where that is not known.
        wrong: What came that had not been sent; empty if all was right.
    """

    what: str
    rate: float
    normal: float | None
    wrong: str

    @property
    def problem(self) -> str:
        """Why it is no good; empty if it is."""
        if self.wrong or self.normal is None or self.rate >= _SLOW * self.normal:
            return self.wrong
        return f"{self.rate / 1e9:.1f} GB/s where {self.normal / 1e9:.0f} are normal: look at NCCL_DEBUG=INFO"


def measure_links(meshes: Meshes, device: torch.device) -> list[Link]:
    """Times the groups of every dimension that has more than one rank; every rank must call it."""
    found = []
    for name, group in _groups(meshes):
        size, crosses = dist.get_world_size(group), any(from_all_ranks(_crosses(group)))
        for what, collective in (("all-gather", _gather), ("all-to-all", _exchange)):
            seconds, wrong = collective(group, device)
            slowest = max(from_all_ranks(seconds))
            wrongs = sorted({text for text in from_all_ranks(wrong) if text})
            rate = (size - 1) / size * _BYTES[device.type] / slowest
            found.append(Link(f"{name}={size}, {what}", rate, _normal(device, crosses, what), "; ".join(wrongs)))
    return found


def _groups(meshes: Meshes) -> Iterator[tuple[str, dist.ProcessGroup]]:
    for mesh in (meshes.expert, meshes.dense, meshes.cp):
        for name in (mesh.mesh_dim_names or ()) if mesh is not None else ():
            if mesh is not None and mesh[name].size() > 1 and (mesh is not meshes.dense or name != "replicate"):
                yield name, mesh.get_group(name)


def _crosses(group: dist.ProcessGroup) -> bool:
    """Whether ranks of a group are on several nodes, by how torchrun fills them."""
    node = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return len({rank // node for rank in dist.get_process_group_ranks(group)}) > 1


def _normal(device: torch.device, crosses: bool, what: str) -> float | None:
    known = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is None:
        return None
    return OF_NETWORK * known.network if crosses else _REACHED[what] * known.link


def _gather(group: dist.ProcessGroup, device: torch.device) -> tuple[float, str]:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    part = torch.full((_BYTES[device.type] // 4 // size,), float(rank), device=device)
    whole = part.new_empty(size, part.numel())
    seconds = _timed(device, lambda: gather_single(whole.flatten(), part, group=group))
    return seconds, _unlike(whole, "gathered")


def _exchange(group: dist.ProcessGroup, device: torch.device) -> tuple[float, str]:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    sent = torch.full((size, _BYTES[device.type] // 4 // size), float(rank), device=device)
    came = torch.empty_like(sent)
    seconds = _timed(device, lambda: dist.all_to_all_single(came, sent, group=group))
    return seconds, _unlike(came, "exchanged")


def _unlike(came: Tensor, how: str) -> str:
    """What is wrong with rows of which each should hold the number of the rank that sent it."""
    expected = torch.arange(came.shape[0], device=came.device, dtype=came.dtype)
    wrong = (came != expected[:, None]).any(1).nonzero().flatten().tolist()
    return f"what ranks {wrong} of the group sent was not what was {how}" if wrong else ""


def _timed(device: torch.device, collective: object) -> float:
    """Seconds of one of several calls, in the best of several rounds: the first ones of a group set up its links."""
    assert callable(collective)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)

    def timed() -> float:
        wait()
        start = time.perf_counter()
        for _ in range(_TIMES):
            collective()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / _TIMES

    collective()
    return min(timed() for _ in range(_ROUNDS))
