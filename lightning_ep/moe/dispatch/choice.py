"""Which dispatcher a layer gets: the one rule by which rows travel in one way or another."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from lightning_ep.distributed.progress import Progress
from lightning_ep.moe.dispatch.all_to_all import AllToAllDispatcher
from lightning_ep.moe.dispatch.base import Dispatcher
from lightning_ep.moe.dispatch.copy_engine import CopyEngineDispatcher
from lightning_ep.moe.dispatch.local import LocalDispatcher
from lightning_ep.planner.traffic import COPY_ENGINES


def build_dispatcher(
    num_experts: int, group: dist.ProcessGroup, device_type: str, layer: str, progress: Progress
) -> Dispatcher[Any]:
    """The dispatcher of a layer whose experts are spread over a group.

    Args:
        num_experts: Experts of the layer over all ranks.
        group: The EP group.
        device_type: Where rows are: ``"cuda"`` or ``"cpu"``.
        layer: Name of the layer, for messages.
        progress: Where this rank notes what it is waiting for.
    """
    if group.size() == 1:
        return LocalDispatcher(num_experts, layer)
    kind = CopyEngineDispatcher if _by_copies(device_type) else AllToAllDispatcher
    return kind(num_experts, group, layer, progress)


def _by_copies(device_type: str) -> bool:
    """Whether rows are copied between the GPUs of a node; what this cannot serve goes as collectives there, too.

    On CPUs the same protocol would run by its twin, which is for tests.
    """
    return device_type == "cuda" and COPY_ENGINES
