"""Parameters over a tensor-parallel group: DTensors to FSDP, optimizers and checkpoints, plain tensors to forward."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


def distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Shard | Replicate) -> None:
    """Makes a parameter that every rank holds a DTensor; of a sharded one this rank keeps its (even) share."""
    param = module._parameters[name]
    if param is None:
        return
    local = param.detach()
    if isinstance(placement, Shard):
        share = param.shape[placement.dim] // mesh.size()
        # A copy, so that the rest can go.
        local = local.narrow(placement.dim, mesh.get_local_rank() * share, share).clone()
    shards = DTensor.from_local(local.contiguous(), mesh, [placement], run_check=False)
    module._parameters[name] = nn.Parameter(shards, requires_grad=param.requires_grad)


def local(param: Tensor) -> Any:
    """What forward computes with: this rank's part of a parameter that FSDP has gathered.

    The gradient of a part is that of the part; of a whole that all ranks hold it is this rank's contribution, which
    FSDP sums over the group when it reduces.
    """
    if not isinstance(param, DTensor) or param.device_mesh.ndim != 1:
        return param  # None, or still sharded by FSDP: outside of forward
    placements: list[Placement] = [p if isinstance(p, Shard) else Partial() for p in param.placements]
    return param.to_local(grad_placements=placements)


def replicate(module: nn.Module, mesh: DeviceMesh) -> None:
    """Makes the parameters of ``module`` itself that are not distributed yet the same DTensors on all ranks."""
    names = [name for name, param in module._parameters.items() if param is not None and not isinstance(param, DTensor)]
    _distribute_own(module, names, mesh, Replicate())


def split_parameters(module: nn.Module, names: Iterable[str], mesh: DeviceMesh) -> None:
    """Gives every rank its share, of the first dimension, of these parameters of ``module`` itself."""
    _distribute_own(module, [name for name in names if module._parameters[name] is not None], mesh, Shard(0))


def _distribute_own(module: nn.Module, names: list[str], mesh: DeviceMesh, placement: Shard | Replicate) -> None:
    for name in names:
        distribute(module, name, mesh, placement)
    if names:
        module.__class__ = _with_local_parameters(type(module), tuple(names))  # type: ignore[arg-type]


def specialize(module: nn.Module, forward: type[nn.Module], group: Any) -> None:
    """Gives ``module`` the forward of another class and leaves it an instance of its own, under its own name."""
    module.__class__ = _with_forward(type(module), forward)  # type: ignore[arg-type]
    module.tensor_group = group


@cache
def _with_local_parameters(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def view(name: str) -> property:
        return property(lambda self: local(self._parameters[name]))

    # Under the same name, by which transformers finds modules; properties, which torch.compile sees through.
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, **{name: view(name) for name in names}})


@cache
def _with_forward(cls: type[nn.Module], forward: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "forward": forward.forward})
