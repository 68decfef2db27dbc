"""Weights of a model saved and loaded by all ranks of a cell: in the hub's layout, in bf16, without optimizer state."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from benchmarks.cells import Cell
from benchmarks.load_speed import drop_from_cache, weight_files
from benchmarks.measure import fill_parameters
from lightning_ep import ParallelLayout, expert_plan, from_config, from_pretrained
from lightning_ep.hub.export import export_sharded
from lightning_ep.hub.initialize import materialize
from lightning_ep.hub.load import stream_pretrained
from lightning_ep.parallelize import shard


def run(cell: Cell, device: torch.device, folder: Path) -> dict[str, Any]:
    """Saves random weights to ``folder``, synced to the disk, and loads them again, not from the page cache.

    Args:
        cell: What is measured; its masters are fp32 except in ``bf16-true``.
        device: This rank's device.
        folder: A folder that all ranks share; nothing stays there.

    Returns:
        ``save_s``, ``load_s``: seconds until the slowest rank is done; ``gb``: 1e9 bytes of all files.

    Raises:
        RuntimeError: If a weight that was loaded is not the one that was saved.
    """
    cuda = device.type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    layout = ParallelLayout.resolve(cell.ep, "auto", cell.ranks, cell.ranks)
    meshes = layout.build_meshes(device.type)
    path = folder / "weights"
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)  # of a call that was cut short
    try:
        saved = from_config(cell.config())
        shard(saved, layout, meshes, device, expert_plan(saved), MixedPrecisionPolicy())
        fill_parameters(saved, device)
        materialize(saved, device, 0)  # only buffers are left
        start = _together(device)
        export_sharded(saved, path, torch.bfloat16)
        save_s = _together(device) - start
        size = sum(file.stat().st_size for file in weight_files(path))
        dist.barrier()
        if dist.get_rank() == 0:
            drop_from_cache(path)
        dtype = torch.bfloat16 if cell.precision == "bf16-true" else torch.float32
        loaded = from_pretrained(path, dtype=dtype)
        shard(loaded, layout, meshes, device, expert_plan(loaded), MixedPrecisionPolicy())
        start = _together(device)
        stream_pretrained(loaded, device)
        load_s = _together(device) - start
        _compare(saved, loaded)
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
    return {"save_s": save_s, "load_s": load_s, "gb": size / 1e9}


def _together(device: torch.device) -> float:
    """The time, once every rank is here and its device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    return time.perf_counter()


@torch.no_grad()
def _compare(saved: nn.Module, loaded: nn.Module) -> None:
    for (name, old), new in zip(saved.named_parameters(), loaded.parameters(), strict=True):
        before, after = (getattr(p, "to_local", lambda p=p: p)() for p in (old, new))
        if not torch.equal(before.bfloat16(), after.bfloat16()):
            raise RuntimeError(f"rank {os.environ['RANK']}: {name} was not loaded as it was saved.")
