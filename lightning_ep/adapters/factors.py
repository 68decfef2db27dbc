"""PEFT's adapters of fused experts (`target_parameters`), found around these and held expert by expert."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from lightning_ep import transformers_adapter as adapter
from lightning_ep.moe.adapted import AdaptedExperts, ExpertFactor, Factors, flat


def note_adapted_experts(module: nn.Module, plan: Iterable[str]) -> None:
    """Notes on the experts of a plan what PEFT has put around them, and changes nothing.

    Args:
        module: A module with PEFT's adapters, or without.
        plan: Names of the experts in it, as an expert plan has them.

    Raises:
        ValueError: If PEFT has adapted parameters in a way that cannot be served.
    """
    if "peft" not in sys.modules:
        return
    wrappers: dict[Any, str] = {child: name for name, child in module.named_modules() if _is_wrapper(child)}
    for name in plan:
        outermost = module.get_submodule(name)
        chain = _chain(outermost)
        for wrapper in chain:
            _refuse(module, wrapper, name)
            wrappers.pop(wrapper, None)
        if chain:
            adapter.remember(outermost, _describe(chain))
    for wrapper, name in wrappers.items():
        raise ValueError(
            f"target_parameters of PEFT has wrapped {name}.{wrapper.parameter_name}, which belongs to no experts that "
            "can be split over ranks. Name linear layers in target_modules, experts in target_parameters, and what is "
            "to be trained whole (a router) in modules_to_save."
        )


def hold_per_expert(module: nn.Module, outermost: nn.Module) -> None:
    """Puts the factors of experts in ``module`` that `note_adapted_experts` found into the form that is sharded."""
    chain = _chain(outermost)
    for wrapper in chain:
        (name,) = wrapper.lora_A
        if isinstance(wrapper.lora_A[name], ExpertFactor):
            continue
        size, init = wrapper.num_experts, _start_of(module, name)
        wrapper.lora_A[name] = ExpertFactor(wrapper.lora_A[name].weight, size, True, init)
        wrapper.lora_B[name] = ExpertFactor(wrapper.lora_B[name].weight, size, False, init)
    if chain:
        adapter.remember(outermost, _describe(chain))


def hold_flat(outermost: nn.Module) -> None:
    """The reverse of `hold_per_expert`, for a model that is whole: the linear layers with which PEFT computes."""
    chain = _chain(outermost)
    for wrapper in chain:
        for factors in (wrapper.lora_A, wrapper.lora_B):
            for name, factor in factors.items():
                if isinstance(factor, ExpertFactor):
                    weight = flat(factor.weight.detach(), factor.is_a).contiguous()
                    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                    linear.load_state_dict({"weight": weight}, assign=True)
                    factors[name] = linear.requires_grad_(factor.weight.requires_grad)
    if chain:
        adapter.remember(outermost, _describe(chain))


def _is_wrapper(module: nn.Module) -> bool:
    from peft.tuners.lora import ParamWrapper

    return isinstance(module, ParamWrapper)


def _chain(outermost: nn.Module) -> list[Any]:
    """PEFT's wrappers around experts, one for each parameter, from the outermost to the innermost."""
    chain: list[Any] = []
    inner: Any = outermost
    while "peft" in sys.modules and _is_wrapper(inner):
        chain.append(inner)
        inner = inner.base_layer
    return chain


def _describe(chain: list[Any]) -> AdaptedExperts:
    factors = []
    for wrapper in chain:
        (name,) = wrapper.lora_A
        parts = wrapper.lora_A[name], wrapper.lora_B[name]
        factors.append(Factors(wrapper.parameter_name, *parts, wrapper.r[name], wrapper.scaling[name]))
    return AdaptedExperts(chain[-1].base_layer, tuple(factors), partial(_is_off, chain[0]))


def _start_of(module: nn.Module, adapter_name: str) -> bool | str:
    """``init_lora_weights`` of an adapter."""
    configs = (adapter.peft_configs(child) for child in module.modules())
    return next(found[adapter_name].init_lora_weights for found in configs if adapter_name in found)


def _is_off(wrapper: Any) -> bool:
    return bool(wrapper.disable_adapters)


def _refuse(module: nn.Module, wrapper: Any, experts: str) -> None:
    names = list(wrapper.lora_A)
    what = None
    if len(names) != 1:
        what = f"{len(names)} adapters ({', '.join(names)}); give them one"
    elif wrapper.merged:
        what = "an adapter that is merged into them; unmerge it"
    elif wrapper.get_param().ndim != 3:
        what = f"an adapter of {wrapper.parameter_name}, which is no matrix per expert; name the others"
    elif wrapper.get_param().is_meta and (init := _start_of(module, names[0])) not in (True, False, "gaussian"):
        what = f"an adapter with init_lora_weights={init!r}, which needs weights that are not there; use True"
    if what is not None:
        raise ValueError(f"{experts} has {what}.")
