"""A model at full size from the hub's layout through training and its state to an export that transformers reads.

    torchrun --nproc-per-node 2 -m benchmarks.whole_way --directory /local/disk --layers 48 --state-layers 28
    torchrun --nproc-per-node 2 -m benchmarks.whole_way --directory /tmp --sizes tiny --layers 3 --state-layers 2 \\
        --tokens 2x32 --steps 3 --device cpu  # to try it

Random bf16 weights are written in the hub's layout, streamed in, trained with AdamW(stochastic_rounding=True), deleted,
and exported; the first layer of the export, as transformers reads it, must be what was trained, bit for bit. Then a
model of ``--state-layers``, whose state is what the disk holds, is saved after two steps and resumed: its third step
must have the loss, bit for bit, of the run that did not stop. Prints one JSON line; nothing stays on the disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from benchmarks.cells import SIZES, model_config, parse_shape
from benchmarks.measure import join_processes, synchronize
from benchmarks.records import machine, provenance
from benchmarks.workload import fill_parameters
from lightning_ep import AdamW, CausalLM, ExpertParallelStrategy, ParallelLayout, expert_plan, from_config
from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.distributed.shards import whole
from lightning_ep.hub.export import export_sharded
from lightning_ep.hub.initialize import materialize
from lightning_ep.parallelize import shard


def main(arguments: list[str] | None = None) -> None:
    """Goes the way and prints what it took; raises AssertionError where something is not what was trained."""
    parser = argparse.ArgumentParser("python -m benchmarks.whole_way", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--directory", type=Path, required=True, help="on a disk for the model twice, or its state")
    parser.add_argument("--sizes", default="qwen3-30b-a3b", choices=sorted(SIZES))
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--state-layers", type=int, default=0, help="depth whose train state is saved; 0: none is")
    parser.add_argument("--tokens", type=parse_shape, default=(4, 4096))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(arguments)
    device = join_processes(options.device)
    folder = options.directory / "benchmarks-whole-way"
    found: dict[str, float] = {}
    try:
        way = _Way(options, device, folder, found)
        way.there_and_out()
        if options.state_layers:
            way.stop_and_resume()
    finally:
        way.delete(folder)
    found["host_peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        found["gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    if dist.get_rank() == 0:
        rounded = {name: round(value, 3) for name, value in found.items()}
        print(json.dumps({**provenance(), "machine": machine(device), "ranks": dist.get_world_size(), **rounded}))
    dist.destroy_process_group()


class _Way:
    """The steps, each of which notes what it took in ``found``."""

    def __init__(
        self, options: argparse.Namespace, device: torch.device, folder: Path, found: dict[str, float]
    ) -> None:
        self.options, self.device, self.folder, self.found = options, device, folder, found
        self.ranks = dist.get_world_size()
        self.since = time.perf_counter()

    def took(self, name: str) -> None:
        """Notes the seconds since the last note, once every rank is here."""
        synchronize(self.device)
        dist.barrier()
        now = time.perf_counter()
        self.found[f"{name}_s"], self.since = now - self.since, now

    def delete(self, path: Path) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
        dist.barrier()

    def there_and_out(self) -> None:
        hub, export = self.folder / "hub", self.folder / "export"
        self.write(hub, self.options.layers)
        self.found["GB"] = _bytes(hub) / 1e9
        self.took("write")
        module = CausalLM(str(hub), optimizer=_optimizer)

        def loaded() -> None:
            self.took("load")
            self.delete(hub)

        steps = _Steps(loaded, lambda: self.took("train"))
        trainer = self.trainer(self.options.steps, steps, HuggingFaceExport(str(export), "bfloat16"))
        trainer.fit(module, self.data(self.options.steps))
        self.took("export")
        self.found |= {"first_loss": steps.losses[0], "last_loss": steps.losses[-1], "step_s": steps.median_s}
        read: Any = AutoModelForCausalLM.from_pretrained(export, num_hidden_layers=1, dtype=torch.bfloat16)
        for name, param in read.named_parameters():
            assert module.model is not None
            trained = module.model.get_parameter(name)
            assert torch.equal(whole(trained), param.detach()), f"{name} is not what was trained"
        self.took("read_by_transformers")
        self.delete(export)

    def write(self, path: Path, layers: int) -> None:
        model: Any = from_config(model_config(self.options.sizes, layers))
        model.to(torch.bfloat16)
        layout = ParallelLayout.resolve(self.ranks, "auto", self.ranks, self.ranks)
        meshes = layout.build_meshes(self.device.type)
        shard(model, layout, meshes, self.device, expert_plan(model), MixedPrecisionPolicy())
        fill_parameters(model, self.device)
        materialize(model, self.device, 0)  # only buffers are left
        export_sharded(model, path, torch.bfloat16)

    def stop_and_resume(self) -> None:
        path = self.folder / "state.ckpt"
        config = model_config(self.options.sizes, self.options.state_layers)
        saves = _Steps(lambda: self.took("start"), lambda: None, save=(2, path))
        L.seed_everything(0)
        trainer = self.trainer(3, saves, fast_start=True)
        trainer.fit(CausalLM(config, pretrained=False, optimizer=_optimizer), self.data(3))
        self.found |= {"save_s": saves.save_s, "state_GB": _bytes(path) / 1e9}
        self.took("three_steps_and_a_save")
        resumed = _Steps(lambda: self.took("resume"), lambda: None)
        trainer = self.trainer(3, resumed)
        trainer.fit(CausalLM(config, pretrained=False, optimizer=_optimizer), self.data(3), ckpt_path=str(path))
        assert resumed.losses == saves.losses[2:], (resumed.losses, saves.losses)
        self.took("resumed_step")

    def trainer(self, steps: int, *callbacks: L.Callback, fast_start: bool = False) -> L.Trainer:
        cuda = self.device.type == "cuda"
        strategy = (_FastStart if fast_start else ExpertParallelStrategy)(
            ep=self.ranks, activation_checkpointing="full", compile=cuda
        )
        return L.Trainer(
            strategy=strategy, accelerator=self.options.device, devices=self.ranks, max_steps=steps,
            precision="bf16-true", gradient_clip_val=1.0, callbacks=[*callbacks], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False,
        )  # fmt: skip

    def data(self, steps: int) -> Any:
        generator = torch.Generator().manual_seed(dist.get_rank())
        vocab = SIZES[self.options.sizes]["vocab_size"]
        ids = [torch.randint(vocab, self.options.tokens, generator=generator) for _ in range(steps)]
        rows: Any = [{"input_ids": tokens, "labels": tokens} for tokens in ids]
        return DataLoader(rows, batch_size=None)


class _FastStart(ExpertParallelStrategy):
    """Random weights in seconds, as in `benchmarks.ours`."""

    def setup(self, trainer: L.Trainer) -> None:
        assert self.lightning_module is not None
        fill_parameters(self.lightning_module, self.root_device)
        super().setup(trainer)


class _Steps(L.Callback):
    """Losses and times of steps; calls back before the first and after the last, and saves after one."""

    def __init__(self, begins: Any, ends: Any, save: tuple[int, Path] | None = None) -> None:
        self._begins, self._ends, self._save = begins, ends, save
        self.losses: list[float] = []
        self.save_s = 0.0
        self._times: list[float] = []

    @property
    def median_s(self) -> float:
        """Of a step; the host waits for each."""
        apart = sorted(b - a for a, b in zip(self._times, self._times[1:], strict=False))
        return apart[len(apart) // 2]

    def on_train_start(self, *_: Any) -> None:
        self._begins()

    def on_train_end(self, *_: Any) -> None:
        self._ends()

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module.zero_grad()  # Lightning would move gradients and moments to the host, which takes a minute
        trainer.strategy.optimizers = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self._times.append(time.perf_counter())
        if self._save is not None and trainer.global_step == self._save[0]:
            start = time.perf_counter()
            trainer.save_checkpoint(self._save[1])
            self.save_s = time.perf_counter() - start


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _optimizer(params: Any) -> AdamW:
    return AdamW(params, lr=1e-5, stochastic_rounding=True)


if __name__ == "__main__":
    main()
