"""What weights and train states cost on the way to the disk and back, and whether they come back as they were.

    torchrun --nproc-per-node 2 -m benchmarks.disk weights --directory /local/disk --layers 12  # 16 GB
    torchrun --nproc-per-node 2 -m benchmarks.disk checkpoints --directory /local/disk --layers 1
    torchrun --nproc-per-node 2 -m benchmarks.disk weights --directory /tmp --sizes tiny --device cpu  # to try it

    # all 48 layers on a disk of 128 GiB: the hub's layout, training, export; then the state of as many as fit
    torchrun --nproc-per-node 2 -m benchmarks.disk whole-way --directory DISK --layers 48 --tokens 4x4096 --steps 30
    torchrun --nproc-per-node 2 -m benchmarks.disk checkpoints --directory DISK --layers 48 --bf16-weights --steps 2

`weights` saves a model of random bf16 weights in the hub's layout with all ranks, synced, and compares a sequential
read of its files by one process with the load by all ranks, the better of two; cold: dropped from the page cache
before. `whole-way` streams such weights into a CausalLM, deletes them, trains it with AdamW(stochastic_rounding=True)
and exports it: the first layer, as transformers reads it, must be what was trained, bit for bit. `checkpoints` saves
weights and AdamW's moments after each step of a training but the last, at once, then behind the training
(``async_save=True``); the last step of a run that resumes must have the loss, bit for bit, of the one that did not
stop. More layers than fit on the disk are left out, which is said. Each stage is said and kept when it is done:
seconds until the slowest rank was, 1e9 bytes, and of the fullest rank the peaks of host memory so far and of the GPU
in that stage. Nothing stays on the disk.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import resource
import shutil
import statistics
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import transformers
from lightning.pytorch.callbacks import LambdaCallback
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader

import lightning_ep
from benchmarks.cells import SIZES, model_config, parse_shape
from benchmarks.measure import this_device, together
from benchmarks.ours import FastStart, quiet_trainer
from benchmarks.records import machine, parser, provenance, publish
from benchmarks.workload import fill_parameters
from lightning_ep import AdamW, CausalLM, ExpertParallelStrategy, ParallelLayout, expert_plan, from_config, planner
from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.distributed.shards import whole
from lightning_ep.hub.export import export_sharded
from lightning_ep.hub.initialize import materialize
from lightning_ep.hub.load import stream_pretrained
from lightning_ep.parallelize import shard

_READ_BYTES = 32 * 2**20


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; ends the process where they do not go together."""
    made = parser("disk", __doc__, layers=12)
    made.add_argument("what", choices=["weights", "checkpoints", "whole-way"])
    made.add_argument("--directory", type=Path, required=True, help="on the disk to be measured")
    made.add_argument("--tokens", type=parse_shape, default=(1, 64), help="of a training step, per rank: 4x4096")
    made.add_argument("--steps", type=int, default=4, help="of training; there is a save after each but the last")
    made.add_argument("--bf16-weights", action="store_true", help="checkpoints: 6 bytes per parameter, at once alone")
    options = made.parse_args(arguments)
    least = 3 if options.what == "checkpoints" and not options.bf16_weights else 2
    if options.steps < least:
        made.error(f"--steps {options.steps}: {options.what} takes {least} or more.")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measures one of them; raises AssertionError where something does not come back as it was."""
    options = parse(arguments)
    device = this_device(options.device)
    dist.init_process_group(device_id=device if options.device == "cuda" else None)
    options.directory.mkdir(parents=True, exist_ok=True)
    folder = options.directory / "benchmarks-disk"
    _delete(folder)  # of a run that was killed
    together(device)
    fit, free = layers_that_fit(options)
    fit = -int(_largest(-fit, device))
    if fit < options.layers:
        print(f"{fit} of {options.layers} layers fit into {free / 1e9:.1f} GB of {options.directory}.", flush=True)
        options.layers = fit
    report = _Report(options, device)
    try:
        {"weights": weights, "checkpoints": checkpoints, "whole-way": whole_way}[options.what](options, report, folder)
    finally:
        _delete(folder)
    if dist.get_rank() == 0:
        print(report.page)
    dist.destroy_process_group()


class _Report:
    """Says and keeps what a stage took, once it is done. Every rank calls it."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        title = f"{options.what}, {options.layers} layers of {options.sizes}, {dist.get_world_size()} ranks"
        self.page, self._path = "", options.json
        self._rows: list[dict[str, str]] = []
        self._record = {**provenance(), "machine": machine(device), "title": title}

    def __call__(self, stage: str, seconds: float, gb: float | None = None, more: dict[str, str] | None = None) -> None:
        row = {"stage": stage, "s": f"{seconds:.4g}"}
        if gb is not None:
            row |= {"GB": f"{gb:.4g}", "GB/s": f"{gb / seconds:.4g}"}
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        row["host peak GiB"] = f"{_largest(host, self.device):.1f}"
        if self.device.type == "cuda":
            row["GPU peak GiB"] = f"{_largest(torch.cuda.max_memory_allocated() / 2**30, self.device):.1f}"
            torch.cuda.reset_peak_memory_stats()
        self._rows.append({**row, **(more or {})})
        if dist.get_rank() == 0:
            print(", ".join(f"{name} {value}" for name, value in self._rows[-1].items()), flush=True)
            self.page = publish(self._path, {**self._record, "rows": self._rows})


def _largest(value: float, device: torch.device) -> float:
    """Of all ranks."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def layers_that_fit(options: argparse.Namespace) -> tuple[int, int]:
    """Of those that were asked for: whose weights, or states, all fit that are on the disk at a time; bytes there.

    Raises ValueError if not even one does.
    """
    bytes_each = 2
    if options.what == "checkpoints":  # the last state stays until the next one is whole
        bytes_each = (6 if options.bf16_weights else 12) * min(2, options.steps - 1)
    widths = planner.read_widths(model_config(options.sizes, options.layers).to_dict())[0]
    free = shutil.disk_usage(options.directory).free
    for depth in range(options.layers, 0, -1):
        if 1.03 * bytes_each * planner.num_parameters(widths, depth) <= free:
            return depth, free
    raise ValueError(f"{options.directory} has {free / 1e9:.1f} GB free, too little for one layer; take another disk.")


def _delete(path: Path) -> None:
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)


def _gb(path: Path) -> float:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e9


# ---------------------------------------------------------------------- weights


def weights(options: argparse.Namespace, report: _Report, folder: Path) -> None:
    """Saves, sequential reads and loads."""
    _write(options, report, folder)
    files = sorted(folder.glob("*.safetensors"))
    for state in ("cold", "warm"):
        for what, way in (("read", _read), ("load", _load)):
            report(f"{state} {what}", min(way(files, state == "cold", report.device) for _ in range(2)), _gb(folder))


def _write(options: argparse.Namespace, report: _Report, folder: Path) -> None:
    """Random weights in the hub's layout; leaves the device empty."""
    model: Any = from_config(model_config(options.sizes, options.layers))
    model = _sharded(model.to(torch.bfloat16), report.device)
    fill_parameters(model, report.device)
    materialize(model, report.device, 0)  # only buffers are left
    start = together(report.device)
    export_sharded(model, folder, torch.bfloat16)
    report("save", together(report.device) - start, _gb(folder))
    del model
    _collect()


def _collect() -> None:
    """Frees a model that was left, which is full of cycles, for the next, which may need all of the GPU."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is none


def _sharded(model: Any, device: torch.device) -> Any:
    ranks = dist.get_world_size()
    layout = ParallelLayout.resolve(ranks, "auto", ranks, ranks)
    shard(model, layout, layout.build_meshes(device.type), device, expert_plan(model), MixedPrecisionPolicy())
    return model


def _load(files: list[Path], cold: bool, device: torch.device) -> float:
    model = _sharded(lightning_ep.from_pretrained(files[0].parent), device)
    _collect()
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


def whole_way(options: argparse.Namespace, report: _Report, folder: Path) -> None:
    """From weights on the disk through training to an export that transformers reads."""
    hub, export, device = folder / "hub", folder / "export", report.device
    _write(options, report, hub)
    steps, gb = _Steps(device), _gb(hub)

    def loaded(*_: Any) -> None:
        report("cold load, model and optimizer", together(device) - start, gb)
        _delete(hub)  # before the export looks for room
        together(device)

    def trained(*_: Any) -> None:
        step = statistics.median(steps.took)
        rate = f"{options.tokens[0] * options.tokens[1] / step:,.0f}"
        losses = f"{steps.losses[0]:.2f} to {steps.losses[-1]:.2f}"
        found = {"median step s": f"{step:.4g}", "tokens/s per GPU": rate, "loss": losses}
        report(f"{options.steps} steps", steps.ended - steps.began, more=found)

    def exported(*_: Any) -> None:
        report("export", together(device) - steps.ended, _gb(export))

    callbacks: list[L.Callback] = [LambdaCallback(on_fit_start=loaded), steps, LambdaCallback(on_train_end=trained)]
    callbacks += [HuggingFaceExport(str(export), "bfloat16"), LambdaCallback(on_train_end=exported)]
    strategy = ExpertParallelStrategy(activation_checkpointing="full", compile=device.type == "cuda")
    start = _ready(sorted(hub.glob("*.safetensors")), True, device)
    model = _train(options, strategy, True, callbacks, weights=hub).model
    start = together(device)
    transformers.logging.set_verbosity_error()  # the other layers' names
    read: Any = transformers.AutoModelForCausalLM.from_pretrained(export, num_hidden_layers=1, dtype=torch.bfloat16)
    for name, param in read.named_parameters():
        assert torch.equal(whole(model.get_parameter(name)), param.detach()), f"{name} is not what was trained"
    report("a layer read by transformers, equal", together(device) - start)


def checkpoints(options: argparse.Namespace, report: _Report, folder: Path) -> None:
    """A save at once, a resume, and what training waits for a save behind it: the first locks memory."""
    path = folder / "benchmark.ckpt"

    def train(save: bool = True, async_save: bool = False) -> _Steps:
        steps = _Steps(report.device, path if save else None)
        strategy = FastStart(activation_checkpointing="full", async_save=async_save)
        _train(options, strategy, options.bf16_weights, [steps], resume=None if save else path)
        _collect()
        return steps

    at_once = train()
    gb = _gb(path)
    report("save at once", statistics.median(at_once.waited), gb)
    start = together(report.device)
    resumed = train(save=False)
    assert resumed.losses == at_once.losses[-1:], (resumed.losses, at_once.losses)
    report("model and resume, same loss", resumed.began - start, gb)
    if options.bf16_weights:
        return
    behind = train(async_save=True)
    report("async save, first wait", behind.waited[0])
    report("async save, wait", statistics.median(behind.waited[1:]))
    report("async save, in all", statistics.median(behind.saved[1:]), gb)


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

    def __init__(self, device: torch.device, save: Path | None = None) -> None:
        self._device, self._save = device, save
        self.losses: list[float] = []
        self.took: list[float] = []
        self.waited: list[float] = []
        self.saved: list[float] = []
        self.began = self.ended = 0.0

    def on_train_start(self, *_: Any) -> None:
        self.began = self.ended = together(self._device)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        before, self.ended = self.ended, together(self._device)
        self.took.append(self.ended - before)
        said = f"  step {trainer.global_step}: loss {self.losses[-1]:.4f}, {self.took[-1]:.2f} s"
        if self._save is not None and trainer.global_step < trainer.max_steps:
            trainer.save_checkpoint(self._save)
            self.waited.append(together(self._device) - self.ended)
            trainer.strategy.wait_for_checkpoints()  # type: ignore[attr-defined]
            self.saved.append(together(self._device) - self.ended)
            said += f"; a save took {self.saved[-1]:.2f} s, of which {self.waited[-1]:.2f} were waited for"
            self.ended += self.saved[-1]
        if dist.get_rank() == 0:
            print(said, flush=True)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Lightning would move gradients and moments to the host, three times as much as the weights of each rank.
        module.zero_grad()
        trainer.strategy.optimizers = []


if __name__ == "__main__":
    main()
