"""Who fills what is on meta: the rule of the module that holds it, then those of the modules around that write into it.

A transformers model fills what its constructor made by `_init_weights` of each module and then of those around it, some
of which write into their submodules. A module that came later, or that belongs to no model, fills itself as torch's
modules do (`reset_parameters`), and so do the modules around it that came with it. What PEFT adds follows PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.moe.adapted import AdaptedExperts, ExpertFactor
from lightning_ep.ops.registered_experts import stand_in

Rule = Callable[[], object]


@dataclass(frozen=True)
class Holder:
    """A module that may hold tensors on meta.

    Attributes:
        name: Its name.
        module: The module.
        shadow: Its stand-in among stand-ins of all modules, without values: rules run on these, so that they reach no
            tensor but one that is put there to be filled.
        rules: What fills its tensors in ``shadow``, one after the other: the last to write decides.
        is_experts: Whether the first dimension of its parameters is that of experts.
        copy_of: The module whose values it takes over; it has no rules then.
    """

    name: str
    module: nn.Module
    shadow: nn.Module
    rules: tuple[Rule, ...]
    is_experts: bool
    copy_of: nn.Module | None


def holders(root: nn.Module) -> list[Holder]:
    """All modules in ``root``, each once, those that take over values of others last."""
    walk = _Walk(root)
    walk.visit("", root, _Around())
    return sorted(walk.found.values(), key=lambda holder: holder.copy_of is not None)


@dataclass(frozen=True)
class _Around:
    """What the modules around one have to do with it.

    Attributes:
        owner: The innermost transformers model.
        follows: Whether the rules of that model fill the module that holds this one.
        of_model: Rules of the model's own modules around, innermost first.
        of_others: Rules of the modules around that came with it, beside or after the model.
        adapters: The configurations of PEFT's adapters, by name.
    """

    owner: PreTrainedModel | None = None
    follows: bool = False
    of_model: tuple[Rule, ...] = ()
    of_others: tuple[Rule, ...] = ()
    adapters: Mapping[str, Any] = field(default_factory=dict)


class _Walk:
    """From the root down; `visit` notes the holders in ``found``."""

    def __init__(self, root: nn.Module) -> None:
        self.found: dict[nn.Module, Holder] = {}
        models = [*adapter.called_models(root).values(), *adapter.planned_models(root).values()]
        outermost = {experts for model in models for experts in adapter.experts_modules(model).values()}
        self._experts = {module for experts in outermost for module in _by_expert(experts)}
        self._shadows = _shadows(root)
        self._copies: dict[nn.Module, nn.Module] = {}

    def visit(self, name: str, module: nn.Module, around: _Around) -> None:
        if module in self.found:
            return
        shadow = self._shadows[module]
        adapters = getattr(module, "peft_config", None)
        if isinstance(adapters, Mapping):
            around = replace(around, adapters=adapters)
        own = _own_rule(name, shadow, around.adapters)
        if isinstance(module, PreTrainedModel):
            around = replace(around, owner=module, follows=True)
        owner = around.owner
        if owner is not None and adapter.follows_model(module, owner, around.follows, own is not None):
            rule = partial(adapter.apply_init_rule, cast(PreTrainedModel, self._shadows[owner]), shadow)
            rules: tuple[Rule, ...] = (rule, *around.of_model)
            around = replace(around, follows=True, of_model=rules, of_others=())
        else:
            rules = around.of_others if own is None else (own, *around.of_others)
            # What is around a whole model has nothing to do with its insides, nor with what lies beside it.
            holds_model = any(isinstance(child, PreTrainedModel) for child in module.modules())
            around = replace(around, follows=False, of_others=() if holds_model else rules)
        copy_of = self._copies.get(module)
        self.found[module] = Holder(name, module, shadow, rules, module in self._experts, copy_of)
        self._copies.update(_peft_copies(module))
        for key, child in module.named_children():
            # What an adapter wraps was there before it.
            wrapped = adapter.is_peft(module) and key in ("base_layer", "original_module")
            inner = replace(around, follows=owner is not None, of_others=()) if wrapped else around
            self.visit(f"{name}.{key}" if name else key, child, inner)


def _shadows(root: nn.Module) -> dict[nn.Module, nn.Module]:
    shadows = {
        module: stand_in(
            module,
            {key: _without_values(param) for key, param in module._parameters.items()},
            {key: _without_values(buffer) for key, buffer in module._buffers.items()},
        )
        for module in root.modules()
    }
    for module, shadow in shadows.items():
        children = {key: None if child is None else shadows[child] for key, child in module._modules.items()}
        shadow.__dict__["_modules"] = children
    return shadows


def _without_values(tensor: Tensor | None) -> Tensor | None:
    """A stand-in that rules pass over, or write to in vain."""
    if tensor is None:
        return None
    is_param = isinstance(tensor, nn.Parameter)
    empty: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return adapter.mark_initialized(nn.Parameter(empty, requires_grad=False) if is_param else empty)


def _own_rule(name: str, shadow: nn.Module, adapters: Mapping[str, Any]) -> Rule | None:
    """How a module fills itself; no rule if it does not, or holds nothing that has to be filled."""
    if adapter.is_peft(shadow):
        return _peft_rule(name, shadow, adapters)
    # The second is torch's name for it in attention and in whole transformers.
    reset = getattr(type(shadow), "reset_parameters", None) or getattr(type(shadow), "_reset_parameters", None)
    return None if reset is None else partial(reset, shadow)


# -------------------------------------------------------------------------------- PEFT


def _by_expert(outermost: nn.Module) -> list[nn.Module]:
    """The modules whose parameters have a dimension of experts: experts, also inside of adapters, and their factors."""
    inside = outermost
    while adapter.is_peft(inside) and isinstance(inner := getattr(inside, "base_layer", None), nn.Module):
        inside = inner
    adapted = adapter.recall(outermost, AdaptedExperts)
    return [inside, *(adapted.holders if adapted is not None else ())]


def _peft_copies(module: nn.Module) -> dict[nn.Module, nn.Module]:
    """The trainable copies that PEFT makes of whole modules (``modules_to_save``), and the modules they start from."""
    if not (adapter.is_peft(module) and hasattr(module, "original_module") and hasattr(module, "modules_to_save")):
        return {}
    original = cast(nn.Module, module.original_module)
    copies = cast(nn.ModuleDict, module.modules_to_save).values()
    return {child: original.get_submodule(name) for copy in copies for name, child in copy.named_modules()}


def _peft_rule(name: str, shadow: nn.Module, adapters: Mapping[str, Any]) -> Rule | None:
    if any(isinstance(child, PreTrainedModel) for child in shadow.modules()) or hasattr(shadow, "original_module"):
        return None  # a container
    if hasattr(shadow, "reset_lora_parameters"):
        if any(isinstance(factor, ExpertFactor) for factor in cast(nn.ModuleDict, shadow.lora_A).values()):
            return None  # factors of experts fill themselves
        return partial(_reset_lora, name, shadow, adapters)
    return partial(_refuse_peft, name, shadow, "what it starts from")


def _reset_lora(name: str, shadow: Any, adapters: Mapping[str, Any]) -> None:
    for adapter_name in (*shadow.lora_A, *shadow.lora_embedding_A):
        config = adapters[adapter_name]
        how = config.init_lora_weights
        if config.peft_type != "LORA" or adapter_name in shadow.lora_variant:
            _refuse_peft(name, shadow, "the start of a variant of LoRA")
        # Without PEFT's rule linear layers keep torch's, and embeddings what their constructor has drawn.
        if how not in (True, "gaussian", *([False] if adapter_name in shadow.lora_A else [])):
            _refuse_peft(name, shadow, f"init_lora_weights={how!r}")
        shadow.reset_lora_parameters(adapter_name, how)


def _refuse_peft(name: str, shadow: nn.Module, what: str) -> None:
    raise ValueError(
        f"{name} ({type(shadow).__name__}) is on the meta device, where PEFT has put it with the base model, and "
        f"{what} cannot be computed there. Use a LoraConfig with init_lora_weights=True or 'gaussian' and no variant "
        "(use_dora), or build the base model in memory: `AutoModelForCausalLM.from_pretrained` of transformers in "
        "`configure_model`."
    )
