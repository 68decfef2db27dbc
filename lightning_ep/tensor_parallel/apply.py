"""Applying a tensor-parallel plan to a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from lightning_ep import transformers_adapter as adapter
from lightning_ep.tensor_parallel.parameters import replicate


def apply_tensor_plan(model: nn.Module, plan: Mapping[str, ParallelStyle], mesh: DeviceMesh) -> None:
    """Splits a model in place; parameters that no style splits become the same DTensors on all ranks.

    Args:
        model: A transformers model with equal weights on every rank, or on meta.
        plan: What `tensor_plan` gives for it.
        mesh: 1-D, the ranks that share matrices.
    """
    for name, style in plan.items():
        parallelize_module(model.get_submodule(name), mesh, style)
    experts = {id(inner) for outer in adapter.experts_modules(model).values() for inner in outer.modules()}
    for module in model.modules():
        if id(module) not in experts:
            replicate(module, mesh)
