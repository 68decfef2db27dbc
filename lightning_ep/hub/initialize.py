"""Random weights that do not depend on the layout: every parameter, and every expert, has a stream of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.shards import Region, local_region
from lightning_ep.ops.registered_experts import stand_in

Initializer = Callable[[nn.Module], None]


def has_meta_tensors(module: nn.Module) -> bool:
    """Whether any parameter or buffer of ``module`` is on the meta device."""
    return any(t.is_meta for t in (*module.parameters(), *module.buffers()))


@torch.no_grad()
def materialize(module: nn.Module, device: torch.device, seed: int) -> None:
    """Allocates and initialises what is still on meta, shards only, with the model's own rules.

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
    for name, child, rule, is_experts in _rules(module):
        for param_name, param in list(child._parameters.items()):
            if param is None or not param.is_meta:
                continue
            if id(param) not in done:
                full_name = f"{name}.{param_name}" if name else param_name
                shard = _draw_shard(child, param_name, param, rule, seed, full_name, is_experts)
                done[id(param)] = with_storage(param, shard.to(device=device, dtype=param.dtype))
            child._parameters[param_name] = done[id(param)]  # one object for tied parameters
        _fill_buffers(name, child, rule, device)


def _rules(module: nn.Module) -> Iterator[tuple[str, nn.Module, Initializer, bool]]:
    inside: set[str] = set()
    for outer, model in adapter.pretrained_models(module).items():
        experts = set(adapter.experts_modules(model))
        for inner, child, owner in adapter.init_rules(model):
            name = ".".join(part for part in (outer, inner) if part)
            inside.add(name)
            yield name, child, partial(adapter.apply_init_rule, owner), inner in experts
    for name, child in module.named_modules():
        if name not in inside:
            yield name, child, _reset_parameters(name, child), False


def _reset_parameters(name: str, module: nn.Module) -> Initializer:
    def rule(shadow: nn.Module) -> None:
        reset = getattr(type(module), "reset_parameters", None)
        if reset is None:
            raise ValueError(
                f"{name or type(module).__name__} ({type(module).__name__}) is on the meta device and has no "
                "`reset_parameters()`, so its weights cannot be initialised. Define that method or build the module "
                "on a real device."
            )
        reset(shadow)

    return rule


def _draw_shard(
    module: nn.Module, name: str, param: Tensor, rule: Initializer, seed: int, full_name: str, is_experts: bool
) -> Tensor:
    """This rank's part of a parameter, fp32 on the CPU."""
    if not isinstance(param, DTensor):
        if not is_experts:
            return _draw(module, name, tuple(param.shape), rule, seed, full_name)
        shape = tuple(param.shape)
        return torch.cat([_draw_expert(module, name, shape, rule, seed, full_name, e) for e in range(shape[0])])
    region, shape = local_region(param), tuple(param.shape)
    if not is_experts:
        return region.of(_draw(module, name, shape, rule, seed, full_name))
    experts = range(region.start[0], region.start[0] + region.size[0])
    within = Region((0, *region.start[1:]), (1, *region.size[1:]))
    drawn = [within.of(_draw_expert(module, name, shape, rule, seed, full_name, expert)) for expert in experts]
    return torch.cat(drawn) if drawn else torch.empty(region.size)


def _draw_expert(
    module: nn.Module, name: str, shape: tuple[int, ...], rule: Initializer, seed: int, full_name: str, expert: int
) -> Tensor:
    return _draw(module, name, (1, *shape[1:]), rule, seed, f"{full_name}[{expert}]")


def _draw(module: nn.Module, name: str, shape: tuple[int, ...], rule: Initializer, seed: int, stream: str) -> Tensor:
    """Runs the rule on a stand-in of ``module`` in which only one parameter, of the given shape, is to be filled."""
    target = nn.Parameter(torch.full(shape, torch.nan, dtype=torch.float32))
    params = {**_done(module._parameters), name: target}
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        rule(stand_in(module, params, _done(module._buffers)))
    if target.isnan().any():
        raise ValueError(f"{stream}: the initialisation rule of {type(module).__name__} leaves this parameter unset.")
    return target.detach()


def _fill_buffers(name: str, module: nn.Module, rule: Initializer, device: torch.device) -> None:
    on_meta = {key: b for key, b in module._buffers.items() if b is not None and b.is_meta}
    if not on_meta:
        return
    filled = {
        key: torch.full(b.shape, torch.nan if b.is_floating_point() else 0, dtype=b.dtype) for key, b in on_meta.items()
    }
    rule(stand_in(module, _done(module._parameters), {**module._buffers, **filled}))
    for key, buffer in filled.items():
        if buffer.is_floating_point() and buffer.isnan().any():
            raise ValueError(
                f"buffer {name}.{key} is on the meta device and the rules of {type(module).__name__} do not fill it; "
                "build the module on a real device."
            )
        module._buffers[key] = buffer.to(device)


def _done(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Meta stand-ins, marked so that the rules pass over them."""
    return {
        key: None if t is None else adapter.mark_initialized(nn.Parameter(torch.empty(t.shape, device="meta"), False))
        for key, t in tensors.items()
    }


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
