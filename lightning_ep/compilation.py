"""Compiles decoder layers around experts that are opaque to torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


def compile_forward(layer: nn.Module) -> Callable[..., Any]:
    """`torch.compile` for the forward of a layer, in one graph before its experts and one behind them.

    By default a call that cannot be traced ends the graphs of all functions that it is nested in, here the MoE block's
    and the layer's, and each of the four has guards and wrappers of its own, forward and backward: the host then takes
    a fifth longer for a layer. The setting is torch's own and left as it was for all other code.

    Layers with hooks around such a call, as under tensor parallelism, keep the four: torch 2.11 goes on in the closure
    that calls hooks with the globals of another file (a NameError).
    """
    compiled, config = torch.compile(layer.forward), torch._dynamo.config
    two: bool | None = None

    @functools.wraps(layer.forward)
    def nested(*args: Any, **kwargs: Any) -> Any:
        nonlocal two
        if two is None:  # torch looks at hooks once, too: when it compiles
            two = not any(_calls_hooks(module) for module in layer.modules() if module is not layer)
        # Read whenever something is compiled: at a first call, or at a later one with other shapes.
        before, config.nested_graph_breaks = config.nested_graph_breaks, two
        try:
            return compiled(*args, **kwargs)
        finally:
            config.nested_graph_breaks = before

    return nested


def _calls_hooks(module: nn.Module) -> bool:
    """Whether hooks run around something that may not be traced: not in a projection, or a router."""
    if isinstance(module, FSDPModule):  # not traced at all
        return False
    stacked = any(param.ndim > 2 for param in module.parameters(recurse=False))  # experts
    opaque = stacked or any(True for _ in module.children())
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return opaque and any(kinds)
