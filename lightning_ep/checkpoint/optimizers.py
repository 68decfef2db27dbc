"""Optimizer state by parameter name, so that it survives another order of ranks, layout or grouping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_ep.hub.errors import CheckpointError

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
_SHOWN = 8


def clean(name: str) -> str:
    """A parameter's name without the wrappers that torch.compile and activation checkpointing insert."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def listed(names: Iterable[str]) -> str:
    """The first few names and how many there are."""
    names = sorted(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def name_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` with parameter names in place of numbers; the tensors are the optimizer's own."""
    state = optimizer.state_dict()
    names = _names(module, optimizer)
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [{**g, "params": [names[number] for number in g["params"]]} for g in state["param_groups"]],
    }


def _names(module: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names by the numbers that ``optimizer.state_dict()`` gives to parameters."""
    by_id = {id(param): clean(name) for name, param in module.named_parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    unknown = [number for number, param in enumerate(params) if id(param) not in by_id]
    if unknown:
        raise CheckpointError(
            f"{type(optimizer).__name__} holds parameters (numbers {unknown[:_SHOWN]}) that are not in the "
            "LightningModule, so they have no name to be saved under. Register them on a submodule."
        )
    return [by_id[id(param)] for param in params]


def split(named: Mapping[str, Any], module: nn.Module) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Separates what `name_state` returns into tensors, which become shards, and a description of plain values.

    Raises:
        CheckpointError: If a sharded tensor is not shaped like its parameter: no rule says how to shard it on load.
    """
    params = {clean(name): param for name, param in module.named_parameters()}
    tensors: dict[str, dict[str, Tensor]] = {}
    like: dict[str, list[str]] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, entries in named["state"].items():
        for key, value in entries.items():
            if not isinstance(value, Tensor):
                values.setdefault(name, {})[key] = value
                continue
            tensors.setdefault(name, {})[key] = value
            if _is_like(value, params[name], key):
                like.setdefault(name, []).append(key)
            elif isinstance(value, DTensor):
                raise CheckpointError(
                    f"the optimizer keeps {key!r} of shape {tuple(value.shape)} for {name} of shape "
                    f"{tuple(params[name].shape)}. Sharded optimizer state must have its parameter's shape to be "
                    "saved: keep it in full (`tensor.full_tensor()`), or pass save_weights_only=True."
                )
    return tensors, {"param_groups": named["param_groups"], "like_parameter": like, "values": values}


def _is_like(value: Tensor, param: Tensor, key: str) -> bool:
    sharded_alike = isinstance(value, DTensor) or not isinstance(param, DTensor)
    return value.shape == param.shape and sharded_alike and not (param.ndim == 0 and key == "step")


def allocate(
    optimizer: Optimizer,
    module: nn.Module,
    description: Mapping[str, Any],
    sizes: Mapping[tuple[str, str], TensorStorageMetadata],
) -> dict[str, dict[str, Tensor]]:
    """Tensors, sharded as the parameters are now, for the saved state to be read into.

    Args:
        optimizer: The optimizer that will get them.
        module: The module with its parameters.
        description: As `split` returned it when saving.
        sizes: Size and dtype of every saved tensor by parameter name and key.

    Raises:
        CheckpointError: If the optimizer holds other parameters than the saved one.
    """
    params = {clean(name): param for name, param in module.named_parameters()}
    check_groups(optimizer, module, [set(group["params"]) for group in description["param_groups"]])
    tensors: dict[str, dict[str, Tensor]] = {}
    for (name, key), entry in sizes.items():
        if key in description["like_parameter"].get(name, ()):
            tensor = torch.empty_like(params[name].detach(), dtype=entry.properties.dtype)
        else:
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        tensors.setdefault(name, {})[key] = tensor
    return tensors


def check_groups(optimizer: Optimizer, module: nn.Module, saved: list[set[str]]) -> None:
    """Raises CheckpointError unless the optimizer's groups hold the parameters that the saved groups held."""
    names = iter(_names(module, optimizer))
    held = [{next(names) for _ in group["params"]} for group in optimizer.param_groups]
    if saved == held:
        return
    all_saved, all_held = set().union(*saved), set().union(*held)
    raise CheckpointError(
        f"{type(optimizer).__name__} has {len(held)} parameter groups with {len(all_held)} parameters, the checkpoint "
        f"{len(saved)} with {len(all_saved)}. Only saved: {listed(all_saved - all_held) or 'none'}; only here: "
        f"{listed(all_held - all_saved) or 'none'}. Build the same groups, or start anew from the weights alone (see "
        "docs/resume.md)."
    )


def load(
    optimizer: Optimizer,
    module: nn.Module,
    description: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Gives an optimizer its saved state; ``tensors`` are sharded as its parameters are."""
    names = _names(module, optimizer)
    numbers = {name: number for number, name in enumerate(names)}
    values = description["values"]
    state = {numbers[name]: {**values.get(name, {}), **tensors.get(name, {})} for name in {**tensors, **values}}
    # In the order of this optimizer: `load_state_dict` matches by position.
    groups = [
        {**saved, "params": sorted(numbers[name] for name in saved["params"])} for saved in description["param_groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
