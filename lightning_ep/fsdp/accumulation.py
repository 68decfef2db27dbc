"""Gradients over several backward passes: who reduces when, and what becomes of those that nobody reduced."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_ep import transformers_adapter as adapter
from lightning_ep.fsdp import state as fsdp
from lightning_ep.fsdp.optional_parts import OptionalParts
from lightning_ep.moe.experts import is_parallel_experts


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Switches the reduction of gradients, for accumulation over several backward passes.

    The documented choice: while disabled, every group keeps unsharded gradients and reduces once at the end of the
    window, except experts that FSDP shards. Those reduce in every pass: their unsharded gradients would take the
    memory of all experts of an FSDP group, which is most of the model, on every rank. Copies of the model
    (``replicate``) all-reduce once per window. An input embedding in fp32 mostly reduces in every pass, too
    (`lightning_ep.fsdp.embedding`).
    """
    for child in module.modules():
        if isinstance(child, FSDPModule):
            keeps_reducing = is_parallel_experts(child) and _fsdp_size(child) > 1
            child.set_requires_gradient_sync(enabled or keeps_reducing, recurse=False)
            child.set_requires_all_reduce(enabled, recurse=False)


def reduce_kept_gradients(module: nn.Module) -> None:
    """Reduces what a window has kept in parts of the module to which its last backward did not come.

    A backward reduces for all groups below the roots of FSDP that it comes to, and a head or a model beside the first
    one is a root of its own. What copies of the model (``replicate``) have yet to add is added with a gradient only.
    Every rank must call it.
    """
    parts = {child: found for child in module.modules() if (found := adapter.recall(child, OptionalParts)) is not None}
    agreed = {fsdp.state_of(model) for model, found in parts.items() if found.agree_on_waiting()}
    for root in fsdp.roots(module):
        waiting = [group for group in fsdp.groups_of(root) if fsdp.keeps_gradients(group)]
        for group in waiting:
            if fsdp.awaits_all_reduce(group):
                fsdp.add_zero_gradients(group)
        if waiting or root in agreed:
            fsdp.finish_backward(root)


def forget_gradients(module: nn.Module) -> None:
    """Drops what groups have kept of an accumulation window that never ended; ``zero_grad`` does not reach it."""
    for root in fsdp.roots(module):
        fsdp.forget_gradients(root)


def _fsdp_size(experts: nn.Module) -> int:
    param = next(experts.parameters())
    mesh = param.device_mesh if isinstance(param, DTensor) else None
    return mesh["fsdp"].size() if mesh is not None and "fsdp" in (mesh.mesh_dim_names or ()) else 1
