"""How rows travel between ranks: plan, start, wait. No autograd, no experts, no Lightning."""

from lightning_ep.moe.dispatch.all_to_all import AllToAllDispatcher
from lightning_ep.moe.dispatch.base import Dispatcher, ExplainedOutOfMemoryError, Pending
from lightning_ep.moe.dispatch.local import LocalDispatcher
from lightning_ep.moe.dispatch.plan import DispatchPlan

__all__ = [
    "AllToAllDispatcher",
    "DispatchPlan",
    "Dispatcher",
    "ExplainedOutOfMemoryError",
    "LocalDispatcher",
    "Pending",
]
