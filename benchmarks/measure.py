"""Measures the steps of one rank, whoever runs them, and puts the ranks of a cell together."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks.cells import Cell
from benchmarks.kernels import device_kernels, summary
from benchmarks.workload import batches

_HOST_STEPS = 3
_PROFILED_STEPS = 2  # the first one warms the profiler up


def join_processes(kind: str) -> torch.device:
    """Joins the processes of torchrun and returns this one's device, ``"cuda"`` or ``"cpu"``."""
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(device_id=device if kind == "cuda" else None)
    return device


class Meter:
    """Is told when each step's launches are done, and measures in three phases after the warm-up.

    1. ``cell.steps`` steps that nothing interrupts, timed from the end of one to the end of the next by CUDA events
       (the host's clock on the CPU), with the peak of memory;
    2. a few steps with a synchronisation after each: how long the host takes until all is launched;
    3. one step under the profiler.
    """

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.device = device
        self.read_popularity: Callable[[], float] = lambda: math.nan  # set by whoever can count the routing
        self._cuda = device.type == "cuda"
        self.num_steps = cell.warmup + cell.steps + _HOST_STEPS + (_PROFILED_STEPS if self._cuda else 0)
        self._first, self._last = cell.warmup, cell.warmup + cell.steps - 1
        self._step = 0
        self._marks: list[Any] = []
        self._losses: list[Tensor] = []
        self._host_since = 0.0
        self._host_ms: list[float] = []
        self._profile: profile | None = None
        self._results: dict[str, Any] = {}

    def step_ended(self, loss: Callable[[], Tensor]) -> None:
        """To be called after an optimizer step, unsynchronised; ``loss`` gives its mean per token, 0-dim, if asked."""
        step, self._step = self._step, self._step + 1
        if step == 0:
            self._results["max_over_mean_tokens_per_expert"] = self.read_popularity()
        if step == self._first - 1:
            synchronize(self.device)
            if self._cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            self._marks.append(mark(self.device))
        elif self._first <= step <= self._last:
            self._marks.append(mark(self.device))
            if step in (self._first, self._last):
                self._losses.append(loss().detach())
            if step == self._last:
                self._finish_timing()
        elif self._last < step <= self._last + _HOST_STEPS:
            self._end_host_step()
            if step == self._last + _HOST_STEPS and self._cuda:
                self._start_profile()
        elif step > self._last:
            synchronize(self.device)
            assert self._profile is not None
            self._profile.step()
            if step == self.num_steps - 1:
                self._profile.stop()

    def results(self) -> dict[str, Any]:
        """What this rank measured. Raises RuntimeError if fewer than ``num_steps`` steps were run."""
        if self._step < self.num_steps:
            raise RuntimeError(f"only {self._step} of {self.num_steps} steps were run.")
        return {**self._results, "launch_ms": statistics.median(self._host_ms)}

    def _finish_timing(self) -> None:
        synchronize(self.device)
        self._results["steps_ms"] = [elapsed_ms(*pair) for pair in itertools.pairwise(self._marks)]
        self._results["first_loss"], self._results["last_loss"] = float(self._losses[0]), float(self._losses[-1])
        if self._cuda:
            self._results["peak_allocated_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            self._results["peak_reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
        self._host_since = time.perf_counter()

    def _end_host_step(self) -> None:
        self._host_ms.append((time.perf_counter() - self._host_since) * 1e3)
        synchronize(self.device)
        self._host_since = time.perf_counter()

    def _start_profile(self) -> None:
        self._profile = profile(
            activities=[ProfilerActivity.CUDA],
            schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda done: self._results.update(summary(device_kernels(done))),
        )
        self._profile.start()


def synchronize(device: torch.device) -> None:
    """Waits until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mark(device: torch.device) -> Any:
    """This moment in what the device works off; on the CPU, now."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(before: Any, after: Any) -> float:
    """Milliseconds between two marks, of a device that is done."""
    return (after - before) * 1e3 if isinstance(before, float) else before.elapsed_time(after)


def run_loop(cell: Cell, meter: Meter, step: Callable[[Tensor], Tensor]) -> None:
    """The training loop of a peer that has none of its own.

    ``step`` takes token ids ``[B, S]`` on the device, runs all of a step, clipping included, and returns the mean loss.
    """
    for batch in batches(cell, meter.num_steps):
        loss = step(batch["input_ids"].to(meter.device, non_blocking=True))
        meter.step_ended(loss.clone)


def merge(cell: Cell, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of what all ranks measured.

    A step lasts as long as on its slowest rank; memory and host time are the largest of any rank; GPU times are means
    over ranks, and the kernels are rank 0's. Raises ValueError if the loss is not finite.
    """
    steps = [max(times) for times in zip(*(rank["steps_ms"] for rank in ranks), strict=True)]
    record: dict[str, Any] = {"steps_ms": steps, **rates(cell, steps)}
    for name in ("peak_allocated_gib", "peak_reserved_gib", "launch_ms"):
        if name in ranks[0]:
            record[name] = max(rank[name] for rank in ranks)
    gpu = ("gpu_busy_ms", "communication_ms", "exposed_communication_ms")
    for name in (*gpu, "max_over_mean_tokens_per_expert", "first_loss", "last_loss"):
        if name in ranks[0]:
            record[name] = statistics.fmean(rank[name] for rank in ranks)
    record |= {name: ranks[0][name] for name in ("launches", "by_kind", "by_name") if name in ranks[0]}
    if not (math.isfinite(record["first_loss"]) and math.isfinite(record["last_loss"])):
        raise ValueError(f"the loss is not finite: {record['first_loss']} at first, {record['last_loss']} at last.")
    return record


def rates(cell: Cell, steps_ms: list[float]) -> dict[str, float]:
    """Tokens per second and GPU of steps of a cell: median, 10th and 90th percentile."""
    times = {"": statistics.median(steps_ms), "_p10": quantile(steps_ms, 0.9), "_p90": quantile(steps_ms, 0.1)}
    return {"step_ms": times[""]} | {f"tokens_per_second{of}": cell.tokens / ms * 1e3 for of, ms in times.items()}


def quantile(values: list[float], q: float) -> float:
    """The ``q``-quantile, interpolated linearly."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])
