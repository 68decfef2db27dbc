"""Gradients over several backward passes: who reduces when, and what becomes of those that nobody reduced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_ep import transformers_adapter as adapter


def roots(module: nn.Module) -> Iterator[Any]:
    """States of the roots of FSDP in a module; none before their first forward."""
    for child in module.modules():
        if isinstance(child, FSDPModule) and (state := child._get_fsdp_state())._is_root:
            yield state


def groups_of(root: Any) -> Iterator[Any]:
    """FSDP's groups of parameters below a root, each once."""
    for state in root._state_ctx.all_states:
        if state._fsdp_param_group is not None:
            yield state._fsdp_param_group


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Switches the reduction of gradients, for accumulation over several backward passes.

    The documented choice: while disabled, every group keeps unsharded gradients and reduces once at the end of the
    window, except experts that FSDP shards. Those reduce in every pass: their unsharded gradients would take the
    memory of all experts of an FSDP group, which is most of the model, on every rank. Copies of the model
    (``replicate``) all-reduce once per window.
    """
    for child in module.modules():
        if isinstance(child, FSDPModule):
            keeps_reducing = adapter.is_parallel_experts(child) and _fsdp_size(child) > 1
            child.set_requires_gradient_sync(enabled or keeps_reducing, recurse=False)
            child.set_requires_all_reduce(enabled, recurse=False)


def reduce_kept_gradients(module: nn.Module) -> None:
    """Reduces what a window has kept in parts of the module to which its last backward did not come.

    A backward reduces for all groups below the roots of FSDP that it comes to, and a head or a model beside the first
    one is a root of its own. What copies of the model (``replicate``) have yet to add is added with a gradient only.
    Every rank must call it.
    """
    for root in roots(module):
        waiting = [group for group in groups_of(root) if _keeps_gradients(group)]
        for group in waiting:
            if group._partial_reduce_output is not None:
                _add_zero_gradients(group)
        if waiting:
            root._root_post_backward_final_callback()


def forget_gradients(module: nn.Module) -> None:
    """Drops what groups have kept of an accumulation window that never ended; ``zero_grad`` does not reach it."""
    for root in roots(module):
        forget_gradients_of(root)


def forget_gradients_of(root: Any) -> None:
    """`forget_gradients`, of the groups below one root."""
    for group in groups_of(root):
        group._partial_reduce_output = None
        for param in group.fsdp_params:
            param.unsharded_accumulated_grad = None
            if (unsharded := getattr(param, "_unsharded_param", None)) is not None:
                unsharded.grad = None


def _add_zero_gradients(group: Any) -> None:
    for param in group.fsdp_params:
        if param.sharded_param.requires_grad and param.unsharded_accumulated_grad is None:
            like = param._unsharded_param
            param.unsharded_accumulated_grad = torch.zeros_like(like, dtype=param.reduce_dtype or like.dtype)


def _keeps_gradients(group: Any) -> bool:
    return group._partial_reduce_output is not None or any(
        param.unsharded_accumulated_grad is not None
        or ((unsharded := getattr(param, "_unsharded_param", None)) is not None and unsharded.grad is not None)
        for param in group.fsdp_params
    )


def _fsdp_size(experts: nn.Module) -> int:
    param = next(experts.parameters())
    mesh = param.device_mesh if isinstance(param, DTensor) else None
    return mesh["fsdp"].size() if mesh is not None and "fsdp" in (mesh.mesh_dim_names or ()) else 1
