"""Compiles decoder layers around experts that are opaque to torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def compile_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for the forward of a layer, in one graph before its experts and one behind them.

    By default a call that cannot be traced ends the graphs of all functions that it is nested in, here the MoE block's
    and the layer's, and each of the four has guards and wrappers of its own, forward and backward: the host then takes
    a fifth longer for a layer. The setting is torch's own and left as it was for all other code.
    """
    compiled, config = torch.compile(forward), torch._dynamo.config

    @functools.wraps(forward)
    def nested(*args: Any, **kwargs: Any) -> Any:
        # Read whenever something is compiled: at a first call, or at a later one with other shapes.
        before, config.nested_graph_breaks = config.nested_graph_breaks, True
        try:
            return compiled(*args, **kwargs)
        finally:
            config.nested_graph_breaks = before

    return nested
