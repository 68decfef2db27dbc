"""Consecutive decoder layers as one group of FSDP: one gather and one reduction, and hooks for the host once."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.utils import _apply_to_tensors

from lightning_ep.fsdp.passes import end_pass

# Up to this many parameters are gathered and reduced together: 320 MB in bf16, a millisecond between GPUs of a node.
# FSDP's hooks take the host about 4 ms per group and step, more than the GPU needs for a layer of few tokens.
_GROUPED_PARAMETERS = 160_000_000


def group_layers(layers: Iterable[nn.Module], ignored: Collection[nn.Parameter]) -> list[list[nn.Module]]:
    """Consecutive layers that are small enough together.

    Args:
        layers: The layers in the order of forward. One whose experts FSDP shards stays by itself: several of them would
            be gathered at once.
        ignored: Parameters that FSDP leaves alone.
    """
    groups: list[list[nn.Module]] = []
    room = 0
    for layer in layers:
        alone = any(isinstance(child, FSDPModule) for child in layer.modules())
        size = sum(p.numel() for p in layer.parameters() if p not in ignored)
        if not groups or alone or size > room:
            groups, room = [*groups, []], _GROUPED_PARAMETERS
        groups[-1].append(layer)
        room = -1 if alone else room - size
    return groups


def serve_parts_of(group: list[nn.Module], mp_policy: MixedPrecisionPolicy) -> None:
    """Makes layers of a group do what single ones do.

    FSDP expects all of a group to run, forward and backward. A loss on hidden states in the middle (of an exit, a
    probe) starts backward there, with weights that are not gathered. torch 2.11 also casts the inputs of the first
    layer only. What a forward leaves that ends in the middle, `interrupted` clears away; a layer that is called by
    itself (a probe) leaves nothing.
    """
    first = group[0]
    assert isinstance(first, FSDPModule)
    state = first._get_fsdp_state()
    for layer in group[1:]:
        layer.register_forward_pre_hook(partial(_enter, state, mp_policy), with_kwargs=True)
    for layer in group[:-1]:
        layer.register_forward_hook(partial(_gather_for_backward, state))
    for layer in group:
        layer.register_forward_hook(partial(_end_call_alone, state))


def _enter(state: Any, mp_policy: MixedPrecisionPolicy, layer: nn.Module, args: Any, kwargs: Any) -> Any:
    if not state._fsdp_param_group.is_unsharded:
        raise RuntimeError(
            "The weights of a decoder layer are not gathered, because the layers that FSDP gathers with it have been "
            "through backward already: a reentrant checkpoint around single layers does that. Use "
            "activation_checkpointing='selective' or 'full' instead, or use_reentrant=False."
        )
    dtype = mp_policy.param_dtype
    if dtype is None or not mp_policy.cast_forward_inputs or not any(map(partial(_may_cast, dtype), (args, kwargs))):
        return None

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return _apply_to_tensors(cast, args), _apply_to_tensors(cast, kwargs)


def _may_cast(dtype: torch.dtype, value: Any) -> bool:
    """Whether there may be a floating tensor of another dtype in ``value``: mostly not, and rebuilding takes long."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.dtype != dtype
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple):
        return not isinstance(value, bool | int | str | None)
    return any(_may_cast(dtype, item) for item in value)


def _gather_for_backward(state: Any, layer: nn.Module, args: Any, output: Any) -> None:
    def gather(grad: Tensor) -> None:
        if not state._fsdp_param_group.is_unsharded:
            state._pre_backward(grad)

    for tensor in output if isinstance(output, tuple) else (output,):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(gather)


def _end_call_alone(state: Any, layer: nn.Module, args: Any, output: Any) -> None:
    if state._state_ctx.iter_forward_root not in (None, state) or torch._C._current_graph_task_id() != -1:
        return  # part of a forward of the root, or of a checkpoint's recomputation
    if state._modules_to_run_forward:  # FSDP gathers for backward where all have run
        _gather_for_backward(state, layer, args, output)
    end_pass(state)
