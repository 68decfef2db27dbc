"""How fast weights go to the disk and come back, and how long a checkpoint keeps training waiting.

    torchrun --nproc-per-node 2 -m benchmarks.disk weights --directory /local/disk --layers 12  # 16 GB
    torchrun --nproc-per-node 2 -m benchmarks.disk checkpoints --directory /local/disk --layers 1
    torchrun --nproc-per-node 2 -m benchmarks.disk weights --directory /tmp --sizes tiny --device cpu  # to try it

`weights` saves a model of random bf16 weights in the hub's layout with all ranks, synced, and compares a sequential
read of its files by one process with the load by all ranks, the better of two; cold: dropped from the page cache
before. `checkpoints` trains on random tokens and saves weights and AdamW's moments after each step, at once and behind
the training (``async_save=True``). Both print one JSON line, seconds and 1e9 bytes, and leave nothing on the disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader

from benchmarks.cells import SIZES, model_config
from benchmarks.measure import join_processes, synchronize
from benchmarks.records import machine, provenance
from benchmarks.workload import fill_parameters
from lightning_ep import CausalLM, ExpertParallelStrategy, ParallelLayout, expert_plan, from_config, from_pretrained
from lightning_ep.hub.export import export_sharded
from lightning_ep.hub.initialize import materialize
from lightning_ep.hub.load import stream_pretrained
from lightning_ep.parallelize import shard

_READ_BYTES = 32 * 2**20
_TOKENS = 64  # of a training step, which is not what is measured


def main(arguments: list[str] | None = None) -> None:
    """Measures weights or checkpoints and prints one JSON line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.disk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["weights", "checkpoints"])
    parser.add_argument("--directory", type=Path, required=True, help="on the disk to be measured")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--sizes", default="qwen3-30b-a3b", choices=sorted(SIZES))
    parser.add_argument("--saves", type=int, default=4, help="checkpoints of each kind, 2 or more")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = join_processes(options.device)
    folder = options.directory / "benchmarks-disk"
    try:
        found = (weights if options.what == "weights" else checkpoints)(options, device, folder)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    if dist.get_rank() == 0:
        rounded = {name: round(value, 3) for name, value in found.items()}
        print(json.dumps({**provenance(), "machine": machine(device), "ranks": dist.get_world_size(), **rounded}))
    dist.destroy_process_group()


def _together(device: torch.device) -> float:
    """The time, once every rank is here and its device is done."""
    synchronize(device)
    dist.barrier()
    return time.perf_counter()


# ---------------------------------------------------------------------- weights


def weights(options: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, float]:
    """Seconds to save, and GB/s of saves, sequential reads and loads until the slowest rank is done."""
    model = _sharded(from_config(model_config(options.sizes, options.layers)), device)
    fill_parameters(model, device)
    materialize(model, device, 0)  # only buffers are left
    start = _together(device)
    export_sharded(model, folder / "model", torch.bfloat16)
    save_s = _together(device) - start
    del model
    files = sorted((folder / "model").glob("*.safetensors"))
    gb = sum(file.stat().st_size for file in files) / 1e9
    found = {"GB": gb, "save_s": save_s, "save_GB_per_s": gb / save_s}
    for state in ("cold", "warm"):
        read_s = min(_read(files, state == "cold", device) for _ in range(2))
        load_s = min(_load(folder / "model", files, state == "cold", device) for _ in range(2))
        found |= {f"{state}_read_GB_per_s": gb / read_s, f"{state}_load_GB_per_s": gb / load_s}
    return found


def _sharded(model: Any, device: torch.device) -> Any:
    ranks = dist.get_world_size()
    layout = ParallelLayout.resolve(ranks, "auto", ranks, ranks)
    shard(model, layout, layout.build_meshes(device.type), device, expert_plan(model), MixedPrecisionPolicy())
    return model


def _load(path: Path, files: list[Path], cold: bool, device: torch.device) -> float:
    model = _sharded(from_pretrained(path), device)
    if cold and dist.get_rank() == 0:
        _drop_from_cache(files)
    gc.collect()  # the model of the load before
    start = _together(device)
    stream_pretrained(model, device)
    return _together(device) - start


def _read(files: list[Path], cold: bool, device: torch.device) -> float:
    """Seconds in which rank 0 reads all files from beginning to end into one buffer."""
    if cold and dist.get_rank() == 0:
        _drop_from_cache(files)
    start = _together(device)
    buffer = bytearray(_READ_BYTES)
    for file in files if dist.get_rank() == 0 else []:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return _together(device) - start


def _drop_from_cache(files: list[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # dirty pages cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# ---------------------------------------------------------------------- checkpoints


def checkpoints(options: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, float]:
    """Seconds of a save at once; that training waits for one behind it, the first (locks memory) and later ones."""
    at_once, behind = (_train(options, device, folder / "benchmark.ckpt", kind) for kind in (False, True))
    sync_s, blocked_s = statistics.median(at_once.blocked), statistics.median(behind.blocked[1:])
    return {
        "GB": at_once.gb, "sync_s": sync_s, "sync_GB_per_s": at_once.gb / sync_s, "async_first_s": behind.blocked[0],
        "async_blocked_s": blocked_s, "async_total_s": statistics.median(behind.total[1:]),
        "blocked_share": blocked_s / sync_s,
    }  # fmt: skip


def _train(options: argparse.Namespace, device: torch.device, path: Path, behind: bool) -> _TimedSaves:
    cuda = device.type == "cuda"
    timed = _TimedSaves(path)
    trainer = L.Trainer(
        strategy=ExpertParallelStrategy(ep=dist.get_world_size(), async_save=behind), callbacks=[timed],
        accelerator="cuda" if cuda else "cpu", devices=dist.get_world_size(), max_steps=options.saves,
        precision="bf16-mixed" if cuda else "32-true", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    config = model_config(options.sizes, options.layers)
    module = CausalLM(config, pretrained=False, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-5))
    ids = torch.randint(config.vocab_size, (options.saves, 1, _TOKENS))
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    trainer.fit(module, DataLoader(data, batch_size=None))
    weights_bytes = sum(param.numel() * param.element_size() for param in module.parameters())
    timed.gb = 3 * weights_bytes / 1e9  # with two moments, fp32 like the weights; of all ranks
    return timed


class _TimedSaves(L.Callback):
    """Saves after every step, over the same name, and notes how long the training waits and the save takes in all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.gb = 0.0
        self.blocked: list[float] = []
        self.total: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        assert isinstance(trainer.strategy, ExpertParallelStrategy)
        start = _together(trainer.strategy.root_device)
        trainer.save_checkpoint(self._path)
        self.blocked.append(time.perf_counter() - start)
        trainer.strategy.wait_for_checkpoints()
        self.total.append(_together(trainer.strategy.root_device) - start)


if __name__ == "__main__":
    main()
