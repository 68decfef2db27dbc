"""How rows travel between ranks: plan, start, wait. No autograd, no experts, no Lightning."""

from lightning_ep.dispatch.all_to_all import AllToAllDispatcher
from lightning_ep.dispatch.base import Dispatcher, ExplainedOutOfMemoryError, Pending
from lightning_ep.dispatch.local import LocalDispatcher
from lightning_ep.dispatch.plan import DispatchPlan
from lightning_ep.dispatch.progress import Progress

__all__ = [
    "AllToAllDispatcher",
    "DispatchPlan",
    "Dispatcher",
    "ExplainedOutOfMemoryError",
    "LocalDispatcher",
    "Pending",
    "Progress",
]
