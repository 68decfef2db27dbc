"""Optimizer state by parameter name, so that it survives another order of ranks, layout or grouping; who takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_ep.hub.errors import CheckpointError

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
_SHOWN = 8
# Of this run: not what is computed, but how.
_HOW_TO_COMPUTE = ("foreach", "fused", "capturable", "differentiable", "stochastic_rounding")
CLASSES = "classes"
PARAMETERS = "optimizer_parameters"
_OPTIMIZERS, _SCHEDULERS = "optimizers", "lr_schedulers"


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


def _groups(module: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names in every group."""
    names = iter(_names(module, optimizer))
    return [[next(names) for _ in group["params"]] for group in optimizer.param_groups]


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


BUILD_THE_SAME_GROUPS = (
    "Build the same groups, or start anew from the weights alone (see docs/operate/resume.md). Groups that training "
    "has added must be there again when optimizers are restored, right after `on_fit_start`: add them in it, as "
    "Lightning's BaseFinetuning does."
)


def check_groups(optimizer: Optimizer, module: nn.Module, saved: list[set[str]]) -> None:
    """Raises CheckpointError unless the optimizer's groups hold the parameters that the saved groups held."""
    held = [set(group) for group in _groups(module, optimizer)]
    if saved == held:
        return
    all_saved, all_held = set().union(*saved), set().union(*held)
    raise CheckpointError(
        f"{type(optimizer).__name__} has {len(held)} parameter groups with {len(all_held)} parameters, the checkpoint "
        f"{len(saved)} with {len(all_saved)}. Only saved: {listed(all_saved - all_held) or 'none'}; only here: "
        f"{listed(all_held - all_saved) or 'none'}. {BUILD_THE_SAME_GROUPS}"
    )


def load(
    optimizer: Optimizer,
    module: nn.Module,
    description: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Gives an optimizer its saved state; ``tensors`` are sharded as its parameters are."""
    numbers = {name: number for number, name in enumerate(_names(module, optimizer))}
    values = description["values"]
    state = {numbers[name]: {**values.get(name, {}), **tensors.get(name, {})} for name in {**tensors, **values}}
    groups = _numbered(description["param_groups"], numbers)
    optimizer.load_state_dict({"state": state, "param_groups": continued_groups(optimizer, groups)})


def groups_by_name(trainer: Trainer) -> list[list[list[str]]] | None:
    """Parameters of every group of every optimizer, by which states in one file are told apart; None if some have none.

    There the states have numbers, as in the files of Lightning's other strategies.
    """
    try:
        return [_groups(trainer.lightning_module, optimizer) for optimizer in trainer.optimizers]
    except CheckpointError:
        return None


def renumbered(
    optimizer: Optimizer, module: nn.Module, saved: Mapping[str, Any], groups: list[list[str]]
) -> dict[str, Any]:
    """A state dict with the numbers that its parameters have in this optimizer.

    Args:
        optimizer: Who will get it.
        module: The module with its parameters.
        saved: The state dict.
        groups: What `groups_by_name` gave of the optimizer that it is of.

    Raises:
        CheckpointError: If this optimizer holds other parameters.
    """
    check_groups(optimizer, module, [set(group) for group in groups])
    here = {name: number for number, name in enumerate(_names(module, optimizer))}
    numbers = {before: here[name] for before, name in enumerate(name for group in groups for name in group)}
    return {
        "state": {numbers[before]: values for before, values in saved["state"].items()},
        "param_groups": _numbered(saved["param_groups"], numbers),
    }


def _numbered(groups: Iterable[Mapping[str, Any]], numbers: Mapping[Any, int]) -> list[dict[str, Any]]:
    """Groups with numbers for parameters, in the order of an optimizer: `load_state_dict` matches by position."""
    return [{**group, "params": sorted(numbers[param] for param in group["params"])} for group in groups]


# ---------------------------------------------------------------------------------------------------- who goes on


def classes(trainer: Trainer) -> dict[str, list[str]]:
    """Names of the classes whose states a checkpoint of this run holds."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    found: dict[str, list[Any]] = {_OPTIMIZERS: trainer.optimizers, _SCHEDULERS: schedulers}
    return {kind: [_class_name(item) for item in items] for kind, items in found.items()}


def _class_name(item: Any) -> str:
    return f"{type(item).__module__}.{type(item).__qualname__}"


def check_classes(
    trainer: Trainer, saved: Mapping[str, list[str]], groups: list[list[Mapping[str, Any]]], num_schedulers: int
) -> None:
    """Raises CheckpointError unless this run's optimizers and schedulers are of the classes that were saved.

    State means something to its class only, but nothing in torch asks for it: a scheduler takes any attributes, and an
    optimizer fails in its first step, or follows another rule.

    Args:
        trainer: The trainer that is about to go on.
        saved: As `classes` returned it; empty if the checkpoint does not say.
        groups: The saved parameter groups of every optimizer.
        num_schedulers: Schedulers whose state was saved.
    """
    names = saved.get(_OPTIMIZERS, [])
    for number, (optimizer, before) in enumerate(zip(trainer.optimizers, groups, strict=True)):
        _check_optimizer(optimizer, names[number] if names else None, before[0])
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for scheduler, name in zip(schedulers, saved.get(_SCHEDULERS, []), strict=False):
        if _last(name) != type(scheduler).__name__:
            raise CheckpointError(
                f"the checkpoint was saved by a learning rate scheduler {_last(name)} ({name}), and this run has "
                f"{_class_name(scheduler)}. {_build_the_same('scheduler', _last(name))}"
            )
    if len(schedulers) != num_schedulers:
        rank_zero_warn(
            f"The checkpoint has the state of {num_schedulers} learning rate schedulers, and this run has "
            f"{len(schedulers)}: those that only it had have no effect any more, and those that are new begin at their "
            "first step."
        )


def _check_optimizer(optimizer: Optimizer, name: str | None, saved: Mapping[str, Any]) -> None:
    here = optimizer.param_groups[0].keys() - set(_HOW_TO_COMPUTE)
    missing, unknown = here - saved.keys(), saved.keys() - here - set(_HOW_TO_COMPUTE)
    # A class may gain hyperparameters from one version of torch to the next, or a scheduler may leave its own.
    other_rule = bool(missing & optimizer.defaults.keys()) and bool(unknown)
    if not other_rule and (name is None or _last(name) == type(optimizer).__name__):
        return
    was = f"the optimizer {_last(name)} ({name})" if name is not None else "an optimizer of another class"
    differ = f", with the hyperparameters {_listed(unknown)} in place of {_listed(missing)}" if other_rule else ""
    raise CheckpointError(
        f"the checkpoint was saved by {was}, and this run has {_class_name(optimizer)}{differ}. "
        f"{_build_the_same('optimizer', _last(name) if name is not None else None)}"
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _listed(keys: set[str]) -> str:
    return ", ".join(sorted(keys))


def _build_the_same(what: str, name: str | None) -> str:
    return (
        f"Its state means nothing to another class: return {name or f'the same {what}'} from configure_optimizers, or "
        "start anew from the weights alone (see docs/operate/resume.md)."
    )


def continued_groups(optimizer: Optimizer, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups for ``optimizer.load_state_dict``: the saved hyperparameters, and how this run computes with them.

    Names on rank 0 those that this run would have set otherwise, since nothing else says that they are not used.
    """
    merged, differences = [], []
    for number, (here, before) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
        mine = {key: value for key, value in here.items() if key != "params"}
        how = {key: mine[key] for key in _HOW_TO_COMPUTE if key in mine}
        merged.append({**mine, **before, **how})
        where = f" of group {number}" if len(saved) > 1 else ""
        differences += [
            f"{key}{where} {_plain(before[key])} (not {_plain(mine[key])})"
            for key in sorted((mine.keys() & before.keys()) - how.keys() - _moving(mine, before))
            if _plain(mine[key]) != _plain(before[key])
        ]
    if differences:
        rank_zero_warn(
            f"{type(optimizer).__name__} goes on with the hyperparameters of the checkpoint: {'; '.join(differences)}. "
            "Set others after the optimizers are restored, in `on_train_start`."
        )
    return merged


def _moving(here: Mapping[str, Any], saved: Mapping[str, Any]) -> set[str]:
    """Hyperparameters that schedules change, so that they differ after any resume."""
    scheduled = {"lr"} if "initial_lr" in here or "initial_lr" in saved else set()
    return scheduled | ({"momentum", "betas"} if "max_momentum" in here or "max_momentum" in saved else set())


def _plain(value: Any) -> Any:
    value = value.tolist() if isinstance(value, Tensor) else value
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
