"""What is measured of one rank of a cell, and its process: ``python -m benchmarks.measure CELL RESULT``."""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.cells import Cell
from benchmarks.records import machine, rates

_HOST_STEPS = 3
_PROFILED_STEPS = 2  # the first one warms the profiler up
_KINDS = (  # of kernels: the first pattern that matches a name
    ("NCCL", r"^nccl"),
    ("attention", r"sdpa|flash|fmha"),
    ("AdamW and foreach", r"multi_tensor_apply"),
    ("grouped GEMM", r"GroupProblemShape|group.*(gemm|mm|outer)"),
    ("dense GEMM", r"gemm|cutlass|nvjet"),
    ("Triton", r"^triton_|^_[a-z]"),
    ("FSDP copies", r"chunk_cat|split_with_sizes|CatArray"),
    ("sort and scan", r"sort|radix|scan|cumsum|histogram|bincount"),
    ("memcpy and memset", r"^mem(cpy|set)"),
    ("softmax and loss", r"softmax|nll_loss"),
    ("gather, scatter, index", r"index|gather|scatter"),
    ("reduce", r"reduce"),
    ("elementwise", r"elementwise"),
    ("other", r""),
)


def this_device(kind: str) -> torch.device:
    """The device of this process of torchrun's, made the current one."""
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def synchronize(device: torch.device) -> None:
    """Waits until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def together(device: torch.device) -> float:
    """The time, once every rank is here and its device is done."""
    synchronize(device)
    dist.barrier()
    return time.perf_counter()


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


# ---------------------------------------------------------------------- a rank


class Meter:
    """Is told when each step's launches are done, and measures in three phases after the warm-up.

    1. ``cell.steps`` steps that nothing interrupts, timed from the end of one to the end of the next by CUDA events
       (the host's clock on the CPU), with the peak of memory;
    2. a few steps with a synchronisation after each: how long the host takes until all is launched;
    3. on GPUs one step under the profiler, and one before it, which the first use of the profiler disturbs.
    """

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.device = device
        self.read_popularity: Callable[[], float] = lambda: math.nan  # set by whoever can count the routing
        self.num_steps = cell.warmup + cell.steps + _HOST_STEPS + (_PROFILED_STEPS if device.type == "cuda" else 0)
        self._step = 0
        self._loss: Callable[[], Tensor] = torch.Tensor
        self._results: dict[str, Any] = {}
        self._phases = self._measure(cell)
        next(self._phases)

    def step_ended(self, loss: Callable[[], Tensor]) -> None:
        """To be called after an optimizer step, unsynchronised; ``loss`` gives its mean per token, 0-dim, if asked."""
        self._step, self._loss = self._step + 1, loss
        next(self._phases, None)

    def results(self) -> dict[str, Any]:
        """What this rank measured. Raises RuntimeError if fewer than ``num_steps`` steps were run."""
        if self._step < self.num_steps:
            raise RuntimeError(f"only {self._step} of {self.num_steps} steps were run.")
        return self._results

    def _measure(self, cell: Cell) -> Iterator[None]:
        """Goes on from each yield when a step has ended."""
        cuda, found = self.device.type == "cuda", self._results
        yield
        found["max_over_mean_tokens_per_expert"] = self.read_popularity()
        for _ in range(cell.warmup - 1):
            yield
        synchronize(self.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        marks, losses, host_ms = [mark(self.device)], [], []
        for step in range(cell.steps):
            yield
            marks.append(mark(self.device))
            if step in (0, cell.steps - 1):
                losses.append(self._loss().detach())
        synchronize(self.device)
        found["steps_ms"] = [elapsed_ms(*pair) for pair in itertools.pairwise(marks)]
        found["first_loss"], found["last_loss"] = float(losses[0]), float(losses[-1])
        if cuda:
            found["peak_allocated_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            found["peak_reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
        for _ in range(_HOST_STEPS):
            since = time.perf_counter()
            yield
            host_ms.append((time.perf_counter() - since) * 1e3)
            synchronize(self.device)
        found["launch_ms"] = statistics.median(host_ms)
        for _ in range(_PROFILED_STEPS if cuda else 0):
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                yield
                synchronize(self.device)
            found |= summary(device_kernels(profiled))


def merge(cell: Cell, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of what all ranks measured.

    A step lasts as long as on its slowest rank; memory and host time are the largest of any rank; GPU times are means
    over ranks, and the kernels are rank 0's. Raises ValueError if the loss is not finite.
    """
    steps = [max(times) for times in zip(*(rank["steps_ms"] for rank in ranks), strict=True)]
    record: dict[str, Any] = {"steps_ms": steps, **rates(cell, steps)}
    gpu = ("gpu_busy_ms", "communication_ms", "exposed_communication_ms")
    for put_together, names in (
        (max, ("peak_allocated_gib", "peak_reserved_gib", "launch_ms")),
        (statistics.fmean, (*gpu, "max_over_mean_tokens_per_expert", "first_loss", "last_loss")),
        (next, ("launches", "by_kind")),
    ):
        record |= {name: put_together(rank[name] for rank in ranks) for name in names if name in ranks[0]}
    if not (math.isfinite(record["first_loss"]) and math.isfinite(record["last_loss"])):
        raise ValueError(f"the loss is not finite: {record['first_loss']} at first, {record['last_loss']} at last.")
    return record


# ---------------------------------------------------------------------- kernels


class Kernel(NamedTuple):
    """One thing that the device did, in microseconds."""

    name: str
    start: float
    end: float


def device_kernels(profile: Any) -> list[Kernel]:
    """Kernels, copies and fills of a finished `torch.profiler.profile`, without the ranges that annotate them."""
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]


def summary(kernels: list[Kernel]) -> dict[str, Any]:
    """Milliseconds in all, of communication and by kind, the dearest first, and the number of launches.

    Copies within one rank, which replace NCCL in groups of one, are no communication. Kernels that overlap count once
    in ``gpu_busy_ms``, each in full in ``by_kind``.
    """
    computation = [kernel for kernel in kernels if not kernel.name.startswith("nccl")]
    by_kind: defaultdict[str, float] = defaultdict(float)
    for name, start, end in kernels:
        kind = next(kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE))
        by_kind[kind] += (end - start) / 1e3
    busy = _covered(kernels)
    return {
        "gpu_busy_ms": busy / 1e3,
        "communication_ms": _covered([kernel for kernel in kernels if kernel.name.startswith("nccl")]) / 1e3,
        "exposed_communication_ms": (busy - _covered(computation)) / 1e3,
        "launches": len(kernels),
        "by_kind": dict(sorted(by_kind.items(), key=lambda item: -item[1])),
    }


def _covered(kernels: Iterable[Kernel]) -> float:
    """Time covered by at least one of them."""
    covered, until = 0.0, float("-inf")
    for _, start, end in sorted(kernels, key=lambda kernel: kernel.start):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


# ---------------------------------------------------------------------- the process


def main() -> None:
    """Runs the cell and writes what this rank measured, or why it could not."""
    parent_dies = 1  # PR_SET_PDEATHSIG: a rank that was left behind would keep the GPU's memory
    ctypes.CDLL(None).prctl(parent_dies, signal.SIGKILL)
    cell, path = Cell(**json.loads(sys.argv[1])), Path(sys.argv[2])
    try:
        device = this_device(cell.device)
        torch.manual_seed(0)
        if cell.memory_cap_gib is not None:  # stands in for a smaller card
            share = cell.memory_cap_gib * 2**30 / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        meter = Meter(cell, device)
        if cell.ours:
            from benchmarks.ours import run
        else:
            from benchmarks.peers import run
        run(cell, meter)
        _write(path, {"measured": meter.results(), "machine": machine(device)})
    except BaseException as error:
        traceback.print_exc()
        _write(path, {"status": status(error), "error": one_line(error)})
        sys.stderr.flush()
        os._exit(1)  # an ordinary exit can wait for peers that wait for this rank
    if dist.is_initialized():
        dist.barrier()  # rank 0 keeps the others' store
    sys.stdout.flush()
    os._exit(0)  # nothing that is torn down from here on could change the result, and all of it can hang


def _write(path: Path, result: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.replace(path)  # never half a result


def status(error: BaseException) -> str:
    """``out of memory``, whoever ran out of it (torch's allocator, NCCL, cuBLAS), or ``failed``."""
    out = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
    return "out of memory" if out else "failed"


def one_line(error: BaseException) -> str:
    """The error on one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


if __name__ == "__main__":
    main()
