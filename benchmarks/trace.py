"""What a profiled step says: how long the GPU was busy, and which communication no computation hid."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

Interval = tuple[float, float]

_STAGES = (  # the first pattern that matches names the kind of a kernel
    ("NCCL", r"^nccl"),
    ("attention", r"sdpa|flash|fmha"),
    ("AdamW and foreach", r"multi_tensor_apply"),
    ("grouped GEMM", r"GroupProblemShape|group.*(gemm|mm)"),
    ("dense GEMM", r"gemm|cutlass|nvjet"),
    ("Triton", r"^triton_|^_[a-z]"),
    ("FSDP copies", r"chunk_cat|split_with_sizes|CatArray"),
    ("sort and scan", r"sort|radix|scan|cumsum|histogram|bincount"),
    ("memcpy and memset", r"^mem(cpy|set)"),
    ("softmax and loss", r"softmax|nll_loss"),
    ("gather, scatter, index", r"index|gather|scatter"),
    ("reduce", r"reduce"),
    ("elementwise", r"elementwise"),
)


class Kernel(NamedTuple):
    """One thing that the device did, in microseconds."""

    name: str
    start: float
    end: float


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as disjoint intervals in order; empty ones vanish."""
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Time covered by at least one of the intervals."""
    return sum(end - start for start, end in union(intervals))


def exposed(communication: Iterable[Interval], computation: Iterable[Interval]) -> float:
    """Time covered by communication and not by computation."""
    computation = list(computation)
    return length([*communication, *computation]) - length(computation)


def device_kernels(profile: Any) -> list[Kernel]:
    """Kernels, copies and fills of a finished `torch.profiler.profile`, without the ranges that annotate them."""
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]


def is_communication(name: str) -> bool:
    """Whether a kernel is NCCL's (copies within one rank, which replace it in groups of one, are not)."""
    return name.startswith("nccl")


def summary(kernels: list[Kernel], top: int = 40) -> dict[str, Any]:
    """Busy time, communication and exposed communication of a step in milliseconds, and its most expensive kernels.

    Args:
        kernels: Of one step.
        top: How many kernel names to list, by total time.
    """
    communication = [(k.start, k.end) for k in kernels if is_communication(k.name)]
    computation = [(k.start, k.end) for k in kernels if not is_communication(k.name)]
    return {
        "gpu_busy_ms": length(communication + computation) / 1e3,
        "communication_ms": length(communication) / 1e3,
        "exposed_communication_ms": exposed(communication, computation) / 1e3,
        "launches": len(kernels),
        "by_stage": by_stage(kernels),
        "kernels": by_name(kernels)[:top],
    }


def by_stage(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Milliseconds by kind of kernel, judged by its name; kernels that overlap both count in full."""
    totals: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        kinds = (kind for kind, pattern in _STAGES if re.search(pattern, kernel.name, re.IGNORECASE))
        totals[next(kinds, "other")] += (kernel.end - kernel.start) / 1e3
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def by_name(kernels: list[Kernel]) -> list[dict[str, Any]]:
    """Total milliseconds and number of launches per kernel name, the most expensive first."""
    totals: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        totals[kernel.name[:160]].append(kernel.end - kernel.start)
    rows = [{"name": name, "ms": sum(times) / 1e3, "count": len(times)} for name, times in totals.items()]
    return sorted(rows, key=lambda row: -row["ms"])
