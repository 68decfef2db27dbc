"""Random weights that do not depend on the layout: every parameter, and every expert, has a stream of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.shards import Region, local_region, local_tensor
from lightning_ep.hub.rules import Holder, holders


def has_meta_tensors(module: nn.Module) -> bool:
    """Whether any parameter or buffer of ``module`` is on the meta device."""
    return any(t.is_meta for t in (*module.parameters(), *module.buffers()))


@torch.no_grad()
def materialize(module: nn.Module, device: torch.device, seed: int) -> None:
    """Allocates and initialises what is still on meta, shards only, by the rules of `lightning_ep.hub.rules`.

    Each parameter is drawn on the CPU from a generator keyed by (seed, name), each expert's from one keyed by
    (seed, name, expert index), so that one seed gives the same model on any layout and device. No rank holds more
    than one full dense parameter at a time, and experts of other ranks are never drawn.

    Args:
        module: A module, sharded or not. Tensors that are not on meta are left alone.
        device: Where the shards go.
        seed: Must be the same on every rank.

    Raises:
        ValueError: If a module has parameters on meta and no rule to initialise them, or a buffer that no rule fills.
    """
    done: dict[int, nn.Parameter] = {}
    for holder in holders(module):
        for key, param in list(holder.module._parameters.items()):
            if param is None or not param.is_meta:
                continue
            if id(param) not in done:
                if holder.copy_of is not None:
                    shard = _copy_shard(holder, key, param)
                else:
                    shard = _draw_shard(holder, key, param, seed)
                done[id(param)] = with_storage(param, shard.to(device=device, dtype=param.dtype))
            holder.module._parameters[key] = done[id(param)]  # one object for tied parameters
        _fill_buffers(holder, device, seed)
    for model in adapter.pretrained_models(module).values():
        if adapter.recall(model, _Drawn) is None:  # a later call finds nothing on meta
            adapter.remember(model, _Drawn(seed))


@dataclass(frozen=True)
class _Drawn:
    """What is remembered of a model: the seed of what no checkpoint has filled."""

    seed: int


def drawn_from(model: PreTrainedModel) -> int | None:
    """The seed of `materialize`, None before it."""
    drawn = adapter.recall(model, _Drawn)
    return None if drawn is None else drawn.seed


def _draw_shard(holder: Holder, key: str, param: Tensor, seed: int) -> Tensor:
    """This rank's part of a parameter, fp32 on the CPU."""
    shape = tuple(param.shape)
    region = local_region(param)
    # A base model is the same without its adapters.
    stream = (f"{holder.name}.{key}" if holder.name else key).replace(".base_layer", "")
    if not holder.is_experts:
        return region.of(_draw(holder, key, shape, seed, stream))
    experts = range(region.start[0], region.start[0] + region.size[0])
    within = Region((0, *region.start[1:]), (1, *region.size[1:]))
    drawn = [within.of(_draw(holder, key, (1, *shape[1:]), seed, f"{stream}[{e}]")) for e in experts]
    return torch.cat(drawn) if drawn else torch.empty(region.size)


def _draw(holder: Holder, key: str, shape: tuple[int, ...], seed: int, stream: str) -> Tensor:
    target = nn.Parameter(torch.full(shape, torch.nan, dtype=torch.float32))
    _run(holder, holder.shadow._parameters, {key: target}, seed, stream)
    if target.isnan().any():
        raise ValueError(
            f"{stream}: the initialisation rules of {type(holder.module).__name__} leave this parameter unset."
        )
    return target.detach()


def _fill_buffers(holder: Holder, device: torch.device, seed: int) -> None:
    on_meta = {key: b for key, b in holder.module._buffers.items() if b is not None and b.is_meta}
    if not on_meta:
        return
    # Twice, from two different values: what rules leave alone shows, in integers too.
    first, second = ({key: torch.full(b.shape, fill, dtype=b.dtype) for key, b in on_meta.items()} for fill in (0, 1))
    for buffers in (first, second):
        _run(holder, holder.shadow._buffers, buffers, seed, f"{holder.name}.buffers")
    for key, buffer in first.items():
        if not torch.equal(buffer, second[key]):
            raise ValueError(
                f"buffer {holder.name}.{key} is on the meta device and the rules of {type(holder.module).__name__} do "
                "not fill it; build the module on a real device."
            )
        holder.module._buffers[key] = buffer.to(device)


def _run(holder: Holder, place: dict[str, Any], targets: Mapping[str, Tensor], seed: int, stream: str) -> None:
    """Runs the rules while only ``targets`` are there to be filled, with random numbers of ``stream``."""
    if not holder.rules:
        raise ValueError(
            f"{holder.name or type(holder.module).__name__} ({type(holder.module).__name__}) is on the meta device and "
            "has no `reset_parameters()`, so its weights cannot be initialised. Define that method or build the module "
            "on a real device."
        )
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    before = {key: place[key] for key in targets}
    place.update(targets)
    with torch.random.fork_rng(devices=[]), adapter.marks_are_respected():
        # The CPU's alone: `torch.manual_seed` would seed those of GPUs too, which nobody puts back.
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        for rule in holder.rules:
            rule()
    place.update(before)


def _copy_shard(holder: Holder, key: str, param: Tensor) -> Tensor:
    """This rank's part of a parameter that starts as a copy of one that has its values already."""
    assert holder.copy_of is not None
    source = holder.copy_of.get_parameter(key)
    if local_region(source) != local_region(param):
        raise ValueError(
            f"{holder.name}.{key} starts as a copy of a parameter of which this rank holds another part "
            f"({local_region(source)} in place of {local_region(param)}), so it cannot be made here. Train with tp=1."
        )
    return local_tensor(source).detach().clone()


def with_storage(param: nn.Parameter, shard: Tensor) -> nn.Parameter:
    """A parameter like ``param``, with real storage."""
    data: Tensor = shard
    if isinstance(param, DTensor):
        data = DTensor.from_local(
            shard.contiguous(),
            param.device_mesh,
            param.placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )
    return nn.Parameter(data, requires_grad=param.requires_grad)


def assign(module: nn.Module, shards: dict[int, Tensor]) -> None:
    """Puts shards into the places of the parameters and buffers on meta with these ids."""
    done: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, param in list(child._parameters.items()):
            if param is None or id(param) not in shards:
                continue
            if id(param) not in done:
                done[id(param)] = with_storage(param, shards[id(param)])
            child._parameters[name] = done[id(param)]  # one object for tied parameters
        for name, buffer in list(child._buffers.items()):
            if buffer is not None and id(buffer) in shards:
                child._buffers[name] = shards[id(buffer)]
