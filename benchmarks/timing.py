"""Times a function on one device: fresh inputs, a cold cache, medians; and takes its kernels apart."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import quantile
from benchmarks.trace import by_name, by_stage, device_kernels, length
from benchmarks.worker import machine

_FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of an H200


def time_ms(function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], repeats: int) -> list[float]:
    """Milliseconds of each of ``repeats`` calls, which take the inputs in turn; on CUDA the L2 cache is cold.

    Time is the device's, from the first launch to the end of the last kernel: where the host cannot launch fast
    enough, that shows.
    """
    device = _device(inputs)
    for index in range(3):
        function(*inputs[index % len(inputs)])
    if device.type != "cuda":
        times = []
        for index in range(repeats):
            start = time.perf_counter()
            function(*inputs[index % len(inputs)])
            times.append((time.perf_counter() - start) * 1e3)
        return times
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    events = []
    for index in range(repeats):
        flush.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        function(*inputs[index % len(inputs)])
        after.record()
        events.append((before, after))
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in events]


def spread(times: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    return {"ms": statistics.median(times), "p10": quantile(times, 0.1), "p90": quantile(times, 0.9)}


def stages(function: Callable[..., Any], inputs: tuple[Any, ...]) -> dict[str, Any] | None:
    """Kernel times of one call: busy milliseconds, by stage, and by kernel name; None on the CPU."""
    if _device([inputs]).type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]):  # the first use of the profiler disturbs what it records
        function(*inputs)
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function(*inputs)
        torch.cuda.synchronize()
    kernels = device_kernels(profiled)
    return {
        "busy_ms": length([(k.start, k.end) for k in kernels]) / 1e3,
        "launches": len(kernels),
        "by_stage": by_stage(kernels),
        "kernels": by_name(kernels)[:30],
    }


def write_report(path: Path, module: str, device: torch.device, content: dict[str, Any]) -> None:
    """Writes JSON with what it takes to repeat the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "command": f"python -m {module} {shlex.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
    }
    path.write_text(json.dumps({**header, **content}, indent=1) + "\n")


def _device(inputs: Sequence[tuple[Any, ...]]) -> torch.device:
    return next(value.device for value in inputs[0] if isinstance(value, torch.Tensor))
