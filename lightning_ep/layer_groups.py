"""Consecutive decoder layers as one group of FSDP: one gather and one reduction, and hooks for the host once."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

# Up to this many parameters are gathered and reduced together: 160 MB in bf16, half a millisecond between GPUs of a
# node. FSDP's hooks take the host about 2 ms per group and step, more than the GPU needs for a layer of few tokens.
_GROUPED_PARAMETERS = 80_000_000


def group_layers(layers: Iterable[nn.Module], ignored: Collection[nn.Parameter]) -> list[list[nn.Module]]:
    """Consecutive layers that are small enough together.

    Args:
        layers: The layers in the order of forward. One whose experts FSDP shards stays by itself: several of them would
            be gathered at once.
        ignored: Parameters that FSDP leaves alone.
    """
    groups: list[list[nn.Module]] = []
    total = 0
    for layer in layers:
        alone = any(isinstance(child, FSDPModule) for child in layer.modules())
        size = _GROUPED_PARAMETERS if alone else sum(p.numel() for p in layer.parameters() if p not in ignored)
        if not groups or total + size > _GROUPED_PARAMETERS:
            groups, total = [*groups, []], 0
        groups[-1].append(layer)
        total += size
    return groups


def serve_parts_of(group: list[nn.Module]) -> None:
    """Makes forward and backward right where they do not go through all layers of a group.

    FSDP expects all of a group to run, forward and backward. A loss on hidden states in the middle (of an exit, a
    probe) starts backward there, with weights that are not gathered. A forward that ends there leaves the group
    gathered (torch 2.11 without a backward), and the next one would use its weights as they were.
    """
    first = group[0]
    assert isinstance(first, FSDPModule)
    state = first._get_fsdp_state()
    for layer in group[:-1]:
        layer.register_forward_hook(partial(_gather_for_backward, state))
    if len(group) > 1:
        first.register_forward_pre_hook(partial(_finish_earlier_pass, state), prepend=True)


def _gather_for_backward(state: Any, layer: nn.Module, args: Any, output: Any) -> None:
    def gather(grad: Tensor) -> None:
        if not state._fsdp_param_group.is_unsharded:
            state._pre_backward(grad)

    for tensor in output if isinstance(output, tuple) else (output,):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(gather)


def _finish_earlier_pass(state: Any, layer: FSDPModule, args: Any) -> None:
    if state._modules_to_run_forward:
        state._modules_to_run_forward.clear()
        layer.reshard()
