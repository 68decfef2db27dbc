"""How rows travel between ranks: plan, start, wait. No autograd, no experts, no Lightning."""

from lightning_ep.moe.dispatch.all_to_all import AllToAllDispatcher
from lightning_ep.moe.dispatch.base import Dispatcher, DispatchPlan, ExplainedOutOfMemoryError, Pending
from lightning_ep.moe.dispatch.choice import build_dispatcher
from lightning_ep.moe.dispatch.local import LocalDispatcher

__all__ = [
    "AllToAllDispatcher",
    "DispatchPlan",
    "Dispatcher",
    "ExplainedOutOfMemoryError",
    "LocalDispatcher",
    "Pending",
    "build_dispatcher",
]
