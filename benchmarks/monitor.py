"""What `ExpertLoadMonitor` costs: steps without it, steps that it does not look at, and steps that it does, in turns.

torchrun --nproc-per-node 2 -m benchmarks.monitor --json runs/monitor.json
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
from benchmarks.records import machine, provenance
from benchmarks.workload import batches, fill_parameters
from lightning_ep import AdamW, CausalLM, ExpertParallelStrategy
from lightning_ep.callbacks import ExpertLoadMonitor
from lightning_ep.moe.experts import expert_context
from lightning_ep.routing import moe_layers
from lightning_ep.routing.watched import Watched

_KINDS = ("without", "not looked at", "looked at")  # of steps, in turns
_WARMUP = 2 * len(_KINDS)


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


class _Absence:
    """Takes the monitor out of a model's layers for some steps, as if nobody had ever looked at them."""

    def __init__(self, module: LightningModule) -> None:
        self._contexts = [expert_context(layer.experts) for layer in moe_layers(module)]
        self._routes = [context.route for context in self._contexts]

    def set(self, absent: bool) -> None:
        for context, route in zip(self._contexts, self._routes, strict=True):
            if route is not None:
                watched = route.__self__  # type: ignore[attr-defined]
                watched.kept = None if absent else "values"
            context.route = None if absent else route


class _Steps(Callback):
    """Marks the ends of steps, and profiles the last three, one of each kind."""

    def __init__(self, clock: _Clock, steps: int, device: torch.device) -> None:
        self.clock, self.steps, self.device = clock, steps, device
        self.marks: list[Any] = []
        self.profiles: list[dict[str, Any]] = []
        self._profile: profile | None = None
        self._absence: _Absence | None = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._absence = self._absence or _Absence(pl_module)
        self._absence.set(_kind(trainer.global_step + 1) == "without")
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


def _kind(step: int) -> str:
    return _KINDS[(step - 1) % len(_KINDS)]


def main() -> None:
    """Runs the steps, and writes what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", default="4x4096")
    parser.add_argument("--sizes", default="qwen3-30b-a3b")
    parser.add_argument("--steps", type=int, default=36, help="measured, a multiple of 3")
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
    total = _WARMUP + options.steps + (len(_KINDS) if cuda else 0)
    trainer = Trainer(
        strategy=_FastStart(ep=ranks, compile=cell.compile), accelerator=device.type, devices=ranks,
        precision="bf16-mixed", gradient_clip_val=1.0, max_steps=total, log_every_n_steps=len(_KINDS), logger=False,
        callbacks=[ExpertLoadMonitor(), steps], use_distributed_sampler=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=options.json.parent,
    )  # fmt: skip
    module = CausalLM(cell.config(), pretrained=False, optimizer=functools.partial(AdamW, lr=1e-5))
    data: Any = list(batches(cell, total))
    trainer.fit(module, DataLoader(data, batch_size=None, pin_memory=cuda))
    synchronize(device)
    mine = [elapsed_ms(*pair) for pair in itertools.pairwise(steps.marks)]
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, (mine, {step: dict(spent) for step, spent in clock.spent.items()}, steps.profiles))
    if rank == 0:
        record = _record(every, options.steps)
        record["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]  # of warm-up and steps
        record["entropy"] = trainer.callback_metrics["routing/entropy"].item()
        options.json.write_text(json.dumps({**record, **provenance(), **machine(device)}))
        print(options.json.read_text()[:3000])


def _record(every: list[Any], number: int) -> dict[str, Any]:
    steps_ms = [max(times) for times in zip(*(rank[0] for rank in every), strict=True)]
    by_kind = {kind: steps_ms[place :: len(_KINDS)] for place, kind in enumerate(_KINDS)}
    without = by_kind["without"]
    record: dict[str, Any] = {
        "median_ms": {kind: statistics.median(times) for kind, times in by_kind.items()},
        "median_of_differences_ms": {
            kind: statistics.median(a - b for a, b in zip(by_kind[kind], without, strict=True)) for kind in _KINDS[1:]
        },
        "host_ms": [_host_ms(rank[1], number) for rank in every],
        "steps_ms": steps_ms,
    }
    if profiles := every[0][2]:
        keys = ("gpu_busy_ms", "launches", "communication_ms")
        record["profiles"] = {
            kind: {key: each[key] for key in keys} for kind, each in zip(_KINDS, profiles, strict=True)
        }
        record["kernels_more_ms"] = {
            kind: _more(profiles[0], each) for kind, each in zip(_KINDS[1:], profiles[1:], strict=True)
        }
        record["kinds_ms"] = [each["by_kind"] for each in profiles]
    return record


def _host_ms(spent: dict[int, dict[str, float]], number: int) -> dict[str, dict[str, float]]:
    """The median milliseconds of each function in steps of each kind."""
    names = sorted({name for times in spent.values() for name in times})
    found = {}
    for first, kind in enumerate(_KINDS, _WARMUP + 1):
        steps = range(first, _WARMUP + number + 1, len(_KINDS))
        found[kind] = {name: statistics.median(spent.get(step, {}).get(name, 0.0) for step in steps) for name in names}
    return found


def _more(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """The kernels whose times differ most."""
    names = {**before["by_name"], **after["by_name"]}
    more = {name: after["by_name"].get(name, 0) - before["by_name"].get(name, 0) for name in names}
    return dict(sorted(more.items(), key=lambda item: -abs(item[1]))[:12])


if __name__ == "__main__":
    main()
