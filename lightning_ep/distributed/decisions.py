"""Ranks that train one model decide alike: what decides is the same number on all of them, or all raise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_ep.distributed.agreement import from_all_ranks

_TOLERANCE = 1e-6  # of what ranks compute from the same gathered states, on GPUs whose sums may differ in the last bit


def check_shared(
    metrics: Mapping[str, Any], monitored: Iterable[str], group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Compares the metrics that decide something among ranks; every rank must call it.

    Args:
        metrics: What this rank has logged, by name: 0-dim tensors or numbers.
        monitored: The names that something decides by. One that no rank has logged is left to who looks for it.
        group: The ranks, over gloo or any backend. Default: all.

    Returns:
        Rank 0's metrics, tensors on the CPU: also those that nothing decides by differ where they are not synced.

    Raises:
        ValueError: On every rank, if a monitored metric is not the same on all; with its name, the values and the line
            to write.
    """
    on_host = {name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in metrics.items()}
    gathered = from_all_ranks(on_host, group)
    for name in monitored:
        values = [float(theirs[name]) if name in theirs else None for theirs in gathered]
        if not all(_alike(value, values[0]) for value in values):
            raise ValueError(_unshared(name, values))
    return gathered[0]


def unshared(
    metrics: Mapping[str, Any], monitored: Iterable[str], group: dist.ProcessGroup | None = None
) -> str | None:
    """What `check_shared` would raise, as text; None if ranks share what is monitored."""
    try:
        check_shared(metrics, monitored, group)
    except ValueError as error:
        return str(error)
    return None


def by_rank(values: Iterable[Any]) -> str:
    """``3.1 on rank 0 and 2 others, 2.9 on rank 1``: each value once, with the first rank that has it."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(rank)
    return ", ".join(
        f"{value} on rank {having[0]}" + (f" and {len(having) - 1} more" if len(having) > 1 else "")
        for value, having in ranks.items()
    )


def _alike(value: float | None, first: float | None) -> bool:
    if value is None or first is None:
        return value is first
    return (math.isnan(value) and math.isnan(first)) or math.isclose(value, first, rel_tol=_TOLERANCE)


def _unshared(name: str, values: list[float | None]) -> str:
    found = by_rank("not logged" if value is None else f"{value:.6g}" for value in values)
    return (
        f"{name!r} is monitored, by a checkpoint, early stopping or a scheduler, but ranks do not share it: it is "
        f"{found}. They would steer one model differently. Log what is the same on all of them: "
        f"`self.log({name!r}, ..., sync_dist=True)`, or a torchmetrics.Metric: it syncs an epoch's value itself."
    )
