"""Which dispatcher a layer gets."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from lightning_ep.distributed.progress import Progress
from lightning_ep.moe.dispatch.all_to_all import AllToAllDispatcher
from lightning_ep.moe.dispatch.base import Dispatcher
from lightning_ep.moe.dispatch.local import LocalDispatcher


def build_dispatcher(num_experts: int, group: dist.ProcessGroup, layer: str, progress: Progress) -> Dispatcher[Any]:
    """The dispatcher of a layer whose experts are spread over a group.

    Args:
        num_experts: Experts of the layer over all ranks.
        group: The EP group.
        layer: Name of the layer, for messages.
        progress: Where this rank notes what it is waiting for.
    """
    if group.size() == 1:
        return LocalDispatcher(num_experts, layer)
    return AllToAllDispatcher(num_experts, group, layer, progress)
