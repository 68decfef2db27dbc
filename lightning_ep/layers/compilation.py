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
    a fifth longer for a layer. Nor does torch ask by default whether the modules of a layer have the hooks that were
    compiled with another one, and runs those. Both settings are torch's own and left as they were for all other code.

    Layers with hooks around such a call, as under tensor parallelism, keep the four: torch 2.11 goes on in the closure
    that calls hooks with the globals of another file (a NameError).
    """
    compiled, config = torch.compile(layer.forward), torch._dynamo.config
    callers: list[nn.Module] | None = None

    @functools.wraps(layer.forward)
    def nested(*args: Any, **kwargs: Any) -> Any:
        nonlocal callers
        if callers is None:
            callers = [module for module in layer.modules() if module is not layer and _may_not_be_traced(module)]
        # They are read whenever something is compiled: at a first call, or at a later one with other shapes.
        before = config.nested_graph_breaks, config.skip_nnmodule_hook_guards
        config.nested_graph_breaks = not any(map(_has_hooks, callers))
        config.skip_nnmodule_hook_guards = False
        try:
            return compiled(*args, **kwargs)
        finally:
            config.nested_graph_breaks, config.skip_nnmodule_hook_guards = before

    return nested


def _may_not_be_traced(module: nn.Module) -> bool:
    """Whether a graph may end inside a module: not in a projection or a router, nor in what FSDP has wrapped."""
    stacked = any(param.ndim > 2 for param in module.parameters(recurse=False))  # experts
    return not isinstance(module, FSDPModule) and (stacked or any(True for _ in module.children()))


def _has_hooks(module: nn.Module) -> bool:
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(kinds)
