"""What the GPU did in a profile: for how long, on what kinds of kernels, and which communication nothing hid."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

Interval = tuple[float, float]

_KINDS = (  # the first pattern that matches a kernel's name
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


def device_kernels(profile: Any) -> list[Kernel]:
    """Kernels, copies and fills of a finished `torch.profiler.profile`, without the ranges that annotate them."""
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]


def summary(kernels: list[Kernel]) -> dict[str, Any]:
    """Milliseconds in all, of communication, by kind and by name, and the number of launches.

    Copies within one rank, which replace NCCL in groups of one, are no communication. Kernels that overlap count once
    in ``gpu_busy_ms``, each in full in ``by_kind``.
    """
    communication = [(k.start, k.end) for k in kernels if k.name.startswith("nccl")]
    computation = [(k.start, k.end) for k in kernels if not k.name.startswith("nccl")]
    busy = _length(communication + computation)
    return {
        "gpu_busy_ms": busy / 1e3,
        "communication_ms": _length(communication) / 1e3,
        "exposed_communication_ms": (busy - _length(computation)) / 1e3,
        "launches": len(kernels),
        "by_kind": _totals_ms((_kind(k.name), k) for k in kernels),
        "by_name": dict(list(_totals_ms((k.name[:160], k) for k in kernels).items())[:40]),
    }


def _length(intervals: Iterable[Interval]) -> float:
    """Time covered by at least one of the intervals."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def _kind(name: str) -> str:
    kinds = (kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE))
    return next(kinds, "other")


def _totals_ms(kernels: Iterable[tuple[str, Kernel]]) -> dict[str, float]:
    """Milliseconds by key, most expensive first."""
    totals: dict[str, float] = defaultdict(float)
    for key, kernel in kernels:
        totals[key] += (kernel.end - kernel.start) / 1e3
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
