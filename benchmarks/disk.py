"""What weights and train states cost on the way to the disk and back, and whether they come back as they were.

    torchrun --nproc-per-node 2 -m benchmarks.disk weights --directory /local/disk --layers 12  # 16 GB
    torchrun --nproc-per-node 2 -m benchmarks.disk checkpoints --directory /local/disk --layers 1
    torchrun --nproc-per-node 2 -m benchmarks.disk whole-way --directory /local/disk --layers 48 --tokens 4x4096
    torchrun --nproc-per-node 2 -m benchmarks.disk weights --directory /tmp --sizes tiny --device cpu  # to try it

`weights` saves a model of random bf16 weights in the hub's layout with all ranks, synced, and compares a sequential
read of its files by one process with the load by all ranks, the better of two; cold: dropped from the page cache
before. `whole-way` streams such weights into a CausalLM, trains it with AdamW(stochastic_rounding=True), deletes them,
and exports what it has: the first layer, as transformers reads it, must be what was trained, bit for bit.
`checkpoints` saves weights and AdamW's moments after each step of a training but the last, at once, then behind the
training (``async_save=True``); the last step of a run that resumes must have the loss, bit for bit, of the one that did
not stop. Seconds and 1e9 bytes; nothing stays on the disk.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import resource
import shutil
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import lightning_ep
from benchmarks.cells import SIZES, model_config, parse_shape
from benchmarks.measure import this_device, together
from benchmarks.ours import FastStart, quiet_trainer
from benchmarks.records import parser, publish
from benchmarks.workload import fill_parameters
from lightning_ep import AdamW, CausalLM, ExpertParallelStrategy, ParallelLayout, expert_plan, from_config
from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.distributed.shards import whole
from lightning_ep.hub.export import export_sharded
from lightning_ep.hub.initialize import materialize
from lightning_ep.hub.load import stream_pretrained
from lightning_ep.parallelize import shard

Found = dict[str, float]
_READ_BYTES = 32 * 2**20


def main(arguments: list[str] | None = None) -> None:
    """Measures one of them; raises AssertionError where something does not come back as it was."""
    made = parser("disk", __doc__, layers=12)
    made.add_argument("what", choices=["weights", "checkpoints", "whole-way"])
    made.add_argument("--directory", type=Path, required=True, help="on the disk to be measured")
    made.add_argument("--tokens", type=parse_shape, default=(1, 64), help="of a training step, per rank: 4x4096")
    made.add_argument("--steps", type=int, default=4, help="of training, 3 or more")
    made.add_argument("--bf16-weights", action="store_true", help="state of 6 bytes per parameter, at once alone")
    options = made.parse_args(arguments)
    device = this_device(options.device)
    dist.init_process_group(device_id=device if options.device == "cuda" else None)
    folder = options.directory / "benchmarks-disk"
    measure = {"weights": weights, "checkpoints": checkpoints, "whole-way": whole_way}[options.what]
    try:
        found = measure(options, device, folder)
    finally:
        _delete(folder)
    found["host peak GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        found["GPU peak GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    if dist.get_rank() == 0:
        title = f"{options.what}, {options.layers} layers of {options.sizes}, {dist.get_world_size()} ranks"
        publish(options.json, title, [{name: f"{value:.4g}" for name, value in found.items()}], device)
    dist.destroy_process_group()


def _delete(path: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)


def _gb(path: Path) -> float:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e9


# ---------------------------------------------------------------------- weights


def weights(options: argparse.Namespace, device: torch.device, folder: Path) -> Found:
    """Seconds to save, and GB/s of saves, sequential reads and loads until the slowest rank is done."""
    found = _write(options, device, folder)
    files = sorted(folder.glob("*.safetensors"))
    for state in ("cold", "warm"):
        for what, way in (("read", _read), ("load", _load)):
            seconds = min(way(files, state == "cold", device) for _ in range(2))
            found[f"{state} {what}, GB/s"] = found["GB"] / seconds
    return found


def _write(options: argparse.Namespace, device: torch.device, folder: Path) -> Found:
    """Random weights in the hub's layout."""
    model: Any = from_config(model_config(options.sizes, options.layers))
    model = _sharded(model.to(torch.bfloat16), device)
    fill_parameters(model, device)
    materialize(model, device, 0)  # only buffers are left
    start = together(device)
    export_sharded(model, folder, torch.bfloat16)
    seconds = together(device) - start
    return {"GB": _gb(folder), "save, s": seconds, "save, GB/s": _gb(folder) / seconds}


def _sharded(model: Any, device: torch.device) -> Any:
    ranks = dist.get_world_size()
    layout = ParallelLayout.resolve(ranks, "auto", ranks, ranks)
    shard(model, layout, layout.build_meshes(device.type), device, expert_plan(model), MixedPrecisionPolicy())
    return model


def _load(files: list[Path], cold: bool, device: torch.device) -> float:
    model = _sharded(lightning_ep.from_pretrained(files[0].parent), device)
    gc.collect()  # the model of the load before
    start = _ready(files, cold, device)
    stream_pretrained(model, device)
    return together(device) - start


def _read(files: list[Path], cold: bool, device: torch.device) -> float:
    """Seconds in which rank 0 reads all files from beginning to end into one buffer."""
    start = _ready(files, cold, device)
    buffer = bytearray(_READ_BYTES)
    for file in files if dist.get_rank() == 0 else []:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return together(device) - start


def _ready(files: list[Path], cold: bool, device: torch.device) -> float:
    """The time, once files are dropped from the page cache, if so asked."""
    for file in files if cold and dist.get_rank() == 0 else []:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # dirty pages cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return together(device)


# ---------------------------------------------------------------------- training


def whole_way(options: argparse.Namespace, device: torch.device, folder: Path) -> Found:
    """Seconds from weights on the disk through training to an export that transformers reads."""
    hub, export = folder / "hub", folder / "export"
    found = _write(options, device, hub)
    times = [together(device)]
    steps = _Steps(device, begins=lambda: _delete(hub))
    strategy = ExpertParallelStrategy(activation_checkpointing="full", compile=device.type == "cuda")
    model = _train(options, strategy, True, [steps, HuggingFaceExport(str(export), "bfloat16")], weights=hub).model
    times += [steps.began, steps.ended, together(device)]
    read: Any = AutoModelForCausalLM.from_pretrained(export, num_hidden_layers=1, dtype=torch.bfloat16)
    for name, param in read.named_parameters():
        assert torch.equal(whole(model.get_parameter(name)), param.detach()), f"{name} is not what was trained"
    times.append(together(device))
    names = ("load", "train", "export", "read by transformers")
    found |= {f"{name}, s": after - before for name, (before, after) in zip(names, pairwise(times), strict=True)}
    return {**found, "step, s": statistics.median(steps.took), "last loss": steps.losses[-1]}


def checkpoints(options: argparse.Namespace, device: torch.device, folder: Path) -> Found:
    """Seconds of a save at once, of a resume, and that training waits for a save behind it: the first locks memory."""
    path = folder / "benchmark.ckpt"

    def train(save: bool = True, async_save: bool = False) -> _Steps:
        steps = _Steps(device, path if save else None)
        strategy = FastStart(activation_checkpointing="full", async_save=async_save)
        _train(options, strategy, options.bf16_weights, [steps], resume=None if save else path)
        gc.collect()  # its weights and moments
        return steps

    at_once = train()
    gb, seconds, start = _gb(path), statistics.median(at_once.waited), together(device)
    resumed = train(save=False)
    assert resumed.losses == at_once.losses[-1:], (resumed.losses, at_once.losses)
    found = {"GB": gb, "at once, s": seconds, "at once, GB/s": gb / seconds, "resume, s": resumed.began - start}
    if options.bf16_weights:
        return found
    behind = train(async_save=True)
    waits = statistics.median(behind.waited[1:])
    found |= {"async, first wait, s": behind.waited[0], "async, wait, s": waits, "share of waiting": waits / seconds}
    return {**found, "async, in all, s": statistics.median(behind.saved[1:])}


def _train(
    options: argparse.Namespace, strategy: ExpertParallelStrategy, bf16_weights: bool, callbacks: list[L.Callback],
    weights: Path | None = None, resume: Path | None = None,
) -> Any:  # fmt: skip
    """The module, trained for all steps on random tokens, from random weights or those of a folder."""
    model = model_config(options.sizes, options.layers) if weights is None else str(weights)
    optimizer = functools.partial(AdamW, lr=1e-5, stochastic_rounding=bf16_weights)
    module = CausalLM(model, pretrained=weights is not None, optimizer=optimizer)
    precision, ranks = "bf16-true" if bf16_weights else "bf16-mixed", dist.get_world_size()
    settings: dict[str, Any] = {"precision": precision, "callbacks": callbacks, "max_steps": options.steps}
    generator, vocab = torch.Generator().manual_seed(dist.get_rank()), SIZES[options.sizes]["vocab_size"]
    ids = [torch.randint(vocab, options.tokens, generator=generator) for _ in range(options.steps)]
    rows: Any = [{"input_ids": tokens, "labels": tokens} for tokens in ids]
    trainer = quiet_trainer(strategy, options.device, ranks, **settings)
    trainer.fit(module, DataLoader(rows, batch_size=None), ckpt_path=resume)
    return module


class _Steps(L.Callback):
    """Losses and seconds of steps; saves after each but the last, and notes how long that took and was waited for."""

    def __init__(
        self, device: torch.device, save: Path | None = None, begins: Callable[[], None] = lambda: None
    ) -> None:
        self._device, self._begins, self._save = device, begins, save
        self.losses: list[float] = []
        self.took: list[float] = []
        self.waited: list[float] = []
        self.saved: list[float] = []
        self.began = self.ended = 0.0

    def on_train_start(self, *_: Any) -> None:
        self.began = self.ended = together(self._device)
        self._begins()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        before, self.ended = self.ended, together(self._device)
        self.took.append(self.ended - before)
        if self._save is not None and trainer.global_step < trainer.max_steps:
            trainer.save_checkpoint(self._save)
            self.waited.append(together(self._device) - self.ended)
            trainer.strategy.wait_for_checkpoints()  # type: ignore[attr-defined]
            self.saved.append(together(self._device) - self.ended)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.zero_grad()  # Lightning would move gradients and moments to the host, which takes a minute
        trainer.strategy.optimizers = []


if __name__ == "__main__":
    main()
