"""Measures the steps of one rank, whoever runs them, and puts the ranks of a cell together."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks.cells import Cell
from benchmarks.trace import device_kernels, summary

_HOST_STEPS = 3
_PROFILED_STEPS = 2  # the first one warms the profiler up


class Meter:
    """Is told when each step's launches are done, and measures in three phases after the warm-up.

    1. ``cell.steps`` steps that nothing interrupts, timed from the end of one to the end of the next by CUDA events
       (the host's clock on the CPU), with the peak of memory;
    2. a few steps with a synchronisation after each: how long the host takes until all is launched;
    3. one step under the profiler.

    Args:
        cell: What is measured.
        device: This rank's device.
    """

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.device = device
        self.read_popularity: Callable[[], float] = lambda: math.nan  # set by whoever can count the routing
        self.num_steps = cell.warmup + cell.steps + _HOST_STEPS + (_PROFILED_STEPS if device.type == "cuda" else 0)
        self._first, self._last = cell.warmup, cell.warmup + cell.steps - 1
        self._step = 0
        self._marks: list[Any] = []
        self._losses: list[Tensor] = []
        self._host_since = (0.0, 0.0)
        self._host_ms: list[tuple[float, float]] = []
        self._profile: profile | None = None
        self._results: dict[str, Any] = {}

    def step_ended(self, loss: Tensor) -> None:
        """To be called after the optimizer step, without a synchronisation before it.

        Args:
            loss: The step's mean loss per token on this rank, detached, 0-dim.
        """
        step, self._step = self._step, self._step + 1
        if step == 0:
            self._results["max_over_mean_tokens_per_expert"] = self.read_popularity()
        if step == self._first - 1:
            self._synchronize()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self._marks.append(self._mark())
        elif self._first <= step <= self._last:
            self._marks.append(self._mark())
            self._losses.append(loss.detach())
            if step == self._last:
                self._finish_timing()
                self._start_host_step()
        elif self._last < step <= self._last + _HOST_STEPS:
            self._end_host_step()
            if step == self._last + _HOST_STEPS:
                self._start_profile()
        elif step > self._last:
            self._synchronize()
            assert self._profile is not None
            self._profile.step()
            if step == self.num_steps - 1:
                self._profile.stop()

    def results(self) -> dict[str, Any]:
        """What this rank measured.

        Raises:
            RuntimeError: If fewer than ``num_steps`` steps were run.
        """
        if self._step < self.num_steps:
            raise RuntimeError(f"only {self._step} of {self.num_steps} steps were run.")
        launch, process = zip(*self._host_ms, strict=True)
        return {
            **self._results,
            "launch_ms": statistics.median(launch),
            "process_cpu_ms": statistics.median(process),
        }

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _finish_timing(self) -> None:
        self._synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        cuda = self.device.type == "cuda"
        self._results["step_ms"] = [a.elapsed_time(b) if cuda else (b - a) * 1e3 for a, b in pairs]
        self._results["first_loss"], self._results["last_loss"] = float(self._losses[0]), float(self._losses[-1])
        if cuda:
            self._results["peak_allocated_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            self._results["peak_reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30

    def _start_host_step(self) -> None:
        self._host_since = (time.perf_counter(), time.process_time())

    def _end_host_step(self) -> None:
        now = (time.perf_counter(), time.process_time())
        self._host_ms.append(((now[0] - self._host_since[0]) * 1e3, (now[1] - self._host_since[1]) * 1e3))
        self._synchronize()
        self._start_host_step()

    def _start_profile(self) -> None:
        if self.device.type != "cuda":
            return
        self._profile = profile(
            activities=[ProfilerActivity.CUDA],
            schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda done: self._results.update(summary(device_kernels(done))),
        )
        self._profile.start()


def merge(cell: Cell, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of what all ranks measured.

    A step, a save or a load lasts as long as on its slowest rank; memory and host time are the largest of any rank; GPU
    times are means over ranks, and the kernels are rank 0's.
    """
    if cell.task == "weights":
        return {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    steps = [max(times) for times in zip(*(rank["step_ms"] for rank in ranks), strict=True)]
    median = statistics.median(steps)
    record: dict[str, Any] = {
        "step_ms": median,
        "tokens_per_second": cell.tokens / median * 1e3,
        "tokens_per_second_p10": cell.tokens / quantile(steps, 0.9) * 1e3,
        "tokens_per_second_p90": cell.tokens / quantile(steps, 0.1) * 1e3,
    }
    for name in ("peak_allocated_gib", "peak_reserved_gib", "launch_ms", "process_cpu_ms"):
        if name in ranks[0]:
            record[name] = max(rank[name] for rank in ranks)
    for name in (
        "gpu_busy_ms",
        "communication_ms",
        "exposed_communication_ms",
        "max_over_mean_tokens_per_expert",
        "first_loss",
        "last_loss",
    ):
        if name in ranks[0]:
            record[name] = statistics.fmean(rank[name] for rank in ranks)
    record |= {name: ranks[0][name] for name in ("launches", "by_stage", "kernels") if name in ranks[0]}
    if not (math.isfinite(record["first_loss"]) and math.isfinite(record["last_loss"])):
        raise ValueError(f"the loss is not finite: {record['first_loss']} at first, {record['last_loss']} at last.")
    return record


def quantile(values: list[float], q: float) -> float:
    """The ``q``-quantile, interpolated linearly."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def batches(cell: Cell, count: int) -> Iterator[dict[str, Tensor]]:
    """Random tokens on the CPU; every trainer gets the same ones on the same rank, but for ranks that share them."""
    generator = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")) // (cell.cp * cell.tp))
    for _ in range(count):
        ids = torch.randint(0, cell.widths.vocab, (cell.batch, cell.sequence), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def run_loop(cell: Cell, meter: Meter, step: Callable[[Tensor], Tensor]) -> None:
    """The training loop of a peer that has none of its own.

    Args:
        cell: What is measured.
        meter: Where it is measured.
        step: Takes token ids ``[B, S]`` on the device, runs forward, backward, clipping and the optimizer, and returns
            the mean loss.
    """
    for batch in batches(cell, meter.num_steps):
        meter.step_ended(step(batch["input_ids"].to(meter.device, non_blocking=True)))


@torch.no_grad()
def fill_parameters(model: torch.nn.Module, device: torch.device, std: float = 0.02) -> None:
    """Allocates parameters that are on meta and draws all of them on the device: ones for norms, normal for the rest.

    Seconds faster than any trainer's own initialisation, and the same distribution for all of them. Buffers stay.
    """
    # fn is called with parameters and buffers; `_apply` is how `to_empty` allocates, also under FSDP2.
    model._apply(lambda t: torch.empty_like(t, device=device) if isinstance(t, torch.nn.Parameter) and t.is_meta else t)
    rank = int(os.environ.get("RANK", "0"))
    generator = torch.Generator(device).manual_seed(rank)
    for param in model.parameters():
        local = getattr(param, "to_local", lambda p=param: p)()
        if param.ndim == 1:
            local.fill_(1.0)
        else:
            local.normal_(std=std, generator=generator)


def cap_memory(cell: Cell, device: torch.device) -> None:
    """Limits torch's allocator to ``cell.memory_cap_gib``, which stands in for a smaller card."""
    if cell.memory_cap_gib is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cell.memory_cap_gib * 2**30 / total), device)
