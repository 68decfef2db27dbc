"""PEFT's adapters of fused experts (`target_parameters`), held expert by expert as long as a model is sharded.

PEFT holds the factors of all experts flat, as the weights of two linear layers: A as ``(E R, in)``, the rows of one
expert after the other, and B as ``(out, R E)``, whose columns go through the experts for each number of the rank. B
does not split by experts, so here they are ``[E, R, in]`` and ``[E, out, R]``, under PEFT's names; files hold them as
PEFT does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_ep import transformers_adapter as adapter
from lightning_ep.moe.adapted import AdaptedExperts, Factors


class ExpertFactor(nn.Module):
    """A or B of all experts, in the place of PEFT's linear layer.

    Args:
        flat: The weight as PEFT has it.
        num_experts: ``E``.
        is_a: Which of the two it is.
        init: ``init_lora_weights`` of the LoraConfig.
    """

    def __init__(self, flat: nn.Parameter, num_experts: int, is_a: bool, init: bool | str) -> None:
        super().__init__()
        self.num_experts, self.is_a, self._init = num_experts, is_a, init
        weight = per_expert(flat.detach(), num_experts, is_a).contiguous()
        self.weight = nn.Parameter(weight, requires_grad=flat.requires_grad)

    def reset_parameters(self) -> None:
        """Draws the weight, or as many experts of it as are there, by PEFT's rule."""
        rank, size = (self.weight.shape[1], self.weight.shape[2]) if self.is_a else (self.weight.shape[2], 0)
        if self.is_a and self._init == "gaussian":
            nn.init.normal_(self.weight, std=1 / rank)
        elif self.is_a:
            nn.init.uniform_(self.weight, -1 / math.sqrt(size), 1 / math.sqrt(size))  # kaiming's with a = sqrt(5)
        elif self._init is False:
            bound = 1 / math.sqrt(rank * self.num_experts)  # of a linear layer with so many features
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            nn.init.zeros_(self.weight)


def per_expert(flat: Tensor, num_experts: int, is_a: bool) -> Tensor:
    """PEFT's ``(E R, in)`` as ``[E, R, in]``, or ``(out, R E)`` as ``[E, out, R]``; a view."""
    if is_a:
        return flat.unflatten(0, (num_experts, -1))
    return flat.unflatten(1, (-1, num_experts)).permute(2, 0, 1)


def flat(weight: Tensor, is_a: bool) -> Tensor:
    """The reverse of `per_expert`."""
    return weight.flatten(0, 1) if is_a else weight.permute(1, 2, 0).flatten(1)


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
        init = _start_of(module, name)
        for factors, is_a in ((wrapper.lora_A, True), (wrapper.lora_B, False)):
            if not isinstance(factors[name], ExpertFactor):
                factors[name] = ExpertFactor(factors[name].weight, wrapper.num_experts, is_a, init)
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
    configs = (getattr(child, "peft_config", None) or {} for child in module.modules())
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
