"""What `ExpertLoadMonitor` costs: steps that it looks at and steps that it does not, in turns.

torchrun --nproc-per-node 2 -m benchmarks.monitor --json runs/monitor.json [--without]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.cells import COMPILE, OURS, Cell, parse_shape
from benchmarks.kernels import device_kernels, summary
from benchmarks.measure import elapsed_ms, mark, synchronize
from benchmarks.workload import batches, fill_parameters
from lightning_ep import AdamW, CausalLM, ExpertParallelStrategy
from lightning_ep.callbacks import ExpertLoadMonitor
from lightning_ep.routing.watched import Watched

_WARMUP = 6  # steps; even ones are looked at


class _FastStart(ExpertParallelStrategy):
    """As in `benchmarks.ours`: random weights are drawn on the device."""

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        fill_parameters(self.lightning_module, self.root_device)
        super().setup(trainer)


class _Clock:
    """Milliseconds of the host in functions of the monitor, by step."""

    def __init__(self) -> None:
        self.step = 0
        self.spent: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))

    def timed(self, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            since = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[self.step][name] += (time.perf_counter() - since) * 1e3

        setattr(owner, name, timed)


class _Steps(Callback):
    """Marks the ends of steps, and profiles the last two: one that is not looked at, and one that is."""

    def __init__(self, clock: _Clock, steps: int, device: torch.device) -> None:
        self.clock, self.steps, self.device = clock, steps, device
        self.marks: list[Any] = []
        self.profiles: list[dict[str, Any]] = []
        self._profile: profile | None = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.clock.step = trainer.global_step + 1
        if trainer.global_step >= _WARMUP + self.steps and self.device.type == "cuda":
            synchronize(self.device)
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.start()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if _WARMUP <= trainer.global_step <= _WARMUP + self.steps:
            self.marks.append(mark(self.device))
        if self._profile is not None:
            synchronize(self.device)
            self._profile.stop()
            self.profiles.append(summary(device_kernels(self._profile)))
            self._profile = None


def main() -> None:
    """Runs the steps, and writes what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", default="4x4096")
    parser.add_argument("--sizes", default="qwen3-30b-a3b")
    parser.add_argument("--steps", type=int, default=24, help="measured, an even number")
    parser.add_argument("--without", action="store_true", help="leave the monitor out")
    options = parser.parse_args()
    cuda, ranks, rank = torch.cuda.is_available(), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    batch, sequence = parse_shape(options.tokens)
    trainer_name = f"{OURS}{ranks}{COMPILE if cuda else ''}"
    cell = Cell(trainer_name, batch, sequence, ranks, options.sizes, options.layers, device=device.type)
    clock = _Clock()
    for name in ("_see", "_end_pass", "take", "measures"):
        clock.timed(Watched, name)
    for name in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"):
        clock.timed(ExpertLoadMonitor, name)
    steps = _Steps(clock, options.steps, device)
    total = _WARMUP + options.steps + (2 if cuda else 0)
    trainer = Trainer(
        strategy=_FastStart(ep=ranks, compile=cell.compile), accelerator=device.type, devices=ranks,
        precision="bf16-mixed", gradient_clip_val=1.0, max_steps=total, log_every_n_steps=2, logger=False,
        callbacks=[*([] if options.without else [ExpertLoadMonitor()]), steps], use_distributed_sampler=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=options.json.parent,
    )  # fmt: skip
    module = CausalLM(cell.config(), pretrained=False, optimizer=functools.partial(AdamW, lr=1e-5))
    data: Any = list(batches(cell, total))
    trainer.fit(module, DataLoader(data, batch_size=None, pin_memory=cuda))
    synchronize(device)
    mine = [elapsed_ms(*pair) for pair in itertools.pairwise(steps.marks)]  # the first one is of an odd step
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, (mine, {step: dict(spent) for step, spent in clock.spent.items()}, steps.profiles))
    if rank == 0:
        options.json.write_text(json.dumps(_record(every, options.steps)))
        print(options.json.read_text()[:3000])


def _record(every: list[Any], number: int) -> dict[str, Any]:
    steps_ms = [max(times) for times in zip(*(rank[0] for rank in every), strict=True)]
    apart, watched = steps_ms[::2], steps_ms[1::2]
    names = sorted({name for rank in every for spent in rank[1].values() for name in spent})
    looked = range(_WARMUP + 2, _WARMUP + number + 1, 2)
    record: dict[str, Any] = {
        "median_ms": {"not looked at": statistics.median(apart), "looked at": statistics.median(watched)},
        "median_of_pairs_ms": statistics.median((a + b) / 2 for a, b in zip(apart, watched, strict=True)),
        "host_ms_of_a_step_looked_at": [
            {name: statistics.median(rank[1].get(step, {}).get(name, 0.0) for step in looked) for name in names}
            for rank in every
        ],
        "steps_ms": steps_ms,
    }
    if profiles := every[0][2]:
        keys = ("gpu_busy_ms", "launches", "communication_ms")
        record["profiles"] = [{key: each[key] for key in keys} for each in profiles]
        apart_ms, watched_ms = (each["by_name"] for each in profiles)
        more = {name: watched_ms.get(name, 0) - apart_ms.get(name, 0) for name in {**apart_ms, **watched_ms}}
        record["kernels_more_ms"] = dict(sorted(more.items(), key=lambda item: -abs(item[1]))[:12])
        record["kinds_ms"] = [each["by_kind"] for each in profiles]
    return record


if __name__ == "__main__":
    main()
