"""What of a model is not bf16 where the model is: what its family asks to be fp32, as transformers loads it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_ep.transformers_adapter.structure import experts_modules, model_class


def fp32_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that stay fp32 in a bf16 model, by name.

    They are those that transformers loads so: named by the family in ``_keep_in_fp32_modules_strict``, or given a dtype
    by its code. Of ``_keep_in_fp32_modules``, which transformers follows in fp16 only, they are the norms whose output
    has the input's dtype all the same (gpt-oss's): what comes after them does not see it, and a product that is
    rounded once is nearer to what the family has trained. Experts are never among them: their GEMMs have one dtype.
    """
    built = _built_in_bf16(model)
    explicit = {name for name, param in built.named_parameters() if param.dtype == torch.float32} if built else set()
    strict, loose = _any_of(model._keep_in_fp32_modules_strict), _any_of(model._keep_in_fp32_modules)
    experts = {param for module in experts_modules(model).values() for param in module.parameters()}
    found: dict[str, nn.Parameter] = {}
    for name, param in model.named_parameters():
        plain = name.replace(".base_layer", "")  # what an adapter wraps keeps its name
        asked = plain in explicit or strict.search(plain)
        if (asked or (loose.search(plain) and _is_exact_norm(model, name))) and param not in experts:
            found[name] = param
    return found


def _any_of(patterns: Iterable[str] | None) -> re.Pattern[str]:
    """As transformers reads them; matches nothing if there are none."""
    return re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns or ()) or r"(?!)")


def _is_exact_norm(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter is the scale of a norm that gives bf16 for bf16 with a scale in fp32."""
    holder, _, key = name.rpartition(".")
    module = model.get_submodule(holder)
    ((own, scale), *others) = module.named_parameters()
    if others or own != key or scale.ndim != 1 or isinstance(module, nn.Linear):
        return False
    x_H = torch.empty(1, len(scale), dtype=torch.bfloat16, device="meta")
    wide = {key: torch.empty_like(scale, dtype=torch.float32, device="meta")}
    return torch.func.functional_call(module, wide, (x_H,)).dtype == torch.bfloat16


def cast_constants(model: PreTrainedModel) -> None:
    """Gives buffers the dtype that transformers gives them in a bf16 model, so that they do not widen what they meet.

    Those of MoE blocks keep theirs: biases of routers are state, which a training may change by less than bf16 shows.
    """
    built = _built_in_bf16(model)
    if built is None:
        return
    narrow = {name for name, buffer in built.named_buffers() if buffer.dtype == torch.bfloat16}
    blocks = {name.rpartition(".")[0] for name in experts_modules(model)}
    for name, buffer in list(model.named_buffers()):
        if (
            name in narrow
            and buffer.dtype == torch.float32
            and not any(name.startswith(f"{block}.") for block in blocks)
        ):
            holder, _, key = name.rpartition(".")
            model.get_submodule(holder)._buffers[key] = buffer.to(torch.bfloat16)


def _built_in_bf16(model: PreTrainedModel) -> PreTrainedModel | None:
    """The same model on meta, as its code builds it in bf16; None for classes of the user's, which may want more."""
    cls = model_class(model)
    if cls.__module__.partition(".")[0] != "transformers":
        return None
    with torch.device("meta"):
        return cls._from_config(deepcopy(model.config), dtype=torch.bfloat16)
