"""An adapted model seen as the one beneath: its tensors under that one's names, and what LoRA has beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.shards import Region
from lightning_ep.moe.adapted import per_expert

_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.", ".lora_magnitude_vector.")


@dataclass(frozen=True)
class Beside:
    """A low-rank product beside a weight: ``W + scale * B A``.

    Attributes:
        a: Name in the model of A, ``[R, in]`` or, of experts, ``[E, R, in]`` (PEFT's ``(E R, in)`` in memory).
        b: Name of B, ``[out, R]`` or ``[E, out, R]`` (PEFT's ``(out, R E)``).
        scale: Of the product.
        num_experts: ``E``; None of a linear layer.
        is_transposed: The weight is ``[E, in, out]``.
    """

    a: str
    b: str
    scale: float
    num_experts: int | None = None
    is_transposed: bool = False

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A and B, whole, expert by expert if they are of experts."""
        if self.num_experts is None or a.ndim == 3:
            return a, b
        return per_expert(a, self.num_experts, True), per_expert(b, self.num_experts, False)

    def merge(self, weight: Tensor, region: Region, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """A box of the weight with the product in it, computed in fp32 and rounded once; on the CPU.

        One expert at a time: in fp32 the experts of a layer are the largest tensor of a training.

        Args:
            weight: The box of the weight.
            region: Where it is.
            a: A as `factors` returned it, like B.
            b: B.
            dtype: What comes out.
        """
        weight, a, b = (tensor.detach().cpu() for tensor in (weight, a, b))
        merged = torch.empty(region.size, dtype=dtype)
        (first, size), columns = list(zip(region.start, region.size, strict=True))[-2:]
        if weight.ndim == 3:
            experts = slice(region.start[0], region.start[0] + region.size[0])
            boxes = zip(weight, merged, a[experts], b[experts], strict=True)
        else:
            boxes = zip((weight,), (merged,), (a,), (b,), strict=True)
        for box, out, a_RA, b_BR in boxes:
            left, right = (a_RA.T, b_BR.T) if self.is_transposed else (b_BR, a_RA)
            product = left.narrow(0, first, size).float() @ right.narrow(1, *columns).float()
            out.copy_(torch.add(box.float(), product, alpha=self.scale))
        return merged


@dataclass(frozen=True)
class Beneath:
    """The model beneath adapters.

    Attributes:
        tensors: Its parameters and persistent buffers by the names that they have without adapters; of what is trained
            whole beside adapters (``modules_to_save``) the trained copies.
        beside: What is beside them, by these names.
        problems: Why the adapters are no sums that a weight could take in.
    """

    tensors: dict[str, Tensor]
    beside: dict[str, Beside]
    problems: list[str]


def is_adapted(model: Any) -> bool:
    """Whether PEFT has put adapters into a transformers model."""
    return bool(adapter.peft_configs(model))


def beneath(model: PreTrainedModel) -> Beneath:
    """The model beneath the adapters of ``model``, which may have none."""
    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    if not is_adapted(model):
        return Beneath(state, {}, [])
    found = Beneath({}, {}, [])
    for name, tensor in state.items():
        if not any(part in name for part in _PARTS) and ".original_module." not in name:
            found.tensors[_without_peft(name, model)] = tensor
    if len(configs := adapter.peft_configs(model)) != 1:
        found.problems.append(f"the model has {len(configs)} adapters ({', '.join(configs)}): give it one")
        return found
    ((adapter_name, config),) = configs.items()
    if config.peft_type != "LORA":
        found.problems.append(f"the adapter is of the method {getattr(config.peft_type, 'value', '?')}, and not LoRA")
        return found
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            if why := _why_no_sum(module, adapter_name):
                found.problems.append(f"{name} {why}")
            else:
                key, beside = _beside(name, module, adapter_name)
                found.beside[_without_peft(key, model)] = beside
    for one in adapter.tied_names(model).items():
        if found.beside.keys() & set(one) and found.tensors.get(one[0]) is found.tensors.get(one[1]):
            found.problems.append(
                f"{one[0]} and {one[1]} are one weight, of which one place has an adapter: with the product in it the "
                "other would change, too. Untie them before training, or write the adapter alone"
            )
    return found


def _beside(name: str, module: Any, adapter_name: str) -> tuple[str, Beside]:
    """What a module of PEFT has beside a parameter, with that one's name."""
    factors = f"{name}.lora_A.{adapter_name}.weight", f"{name}.lora_B.{adapter_name}.weight"
    scale = module.scaling[adapter_name]
    if (parameter := getattr(module, "parameter_name", None)) is None:
        return f"{name}.weight", Beside(*factors, scale)
    transposed = bool(getattr(_innermost(module), "is_transposed", False))
    return f"{name}.{parameter}", Beside(*factors, scale, module.num_experts, transposed)


def _innermost(module: Any) -> nn.Module:
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return cast(nn.Module, module)


def _why_no_sum(module: Any, adapter_name: str) -> str | None:
    if adapter_name not in module.lora_A:
        return "is adapted in another way than by two linear factors (an embedding, a convolution)"
    if module.merged:
        return "has its adapter merged into it; unmerge it"
    if getattr(module, "lora_variant", None):
        return "is adapted by a variant of LoRA (use_dora): its weight is no sum with the product"
    if getattr(module.lora_B[adapter_name], "bias", None) is not None:
        return "has a bias with its adapter (lora_bias), for which the layer beneath has no place"
    inner = _innermost(module)
    if getattr(module, "parameter_name", None) is None and not isinstance(inner, nn.Linear):
        return f"adapts a {type(inner).__name__}, and not a linear layer"
    return None


def _without_peft(name: str, model: PreTrainedModel) -> str:
    """A name in the model beneath."""
    for adapter_name in adapter.peft_configs(model):
        name = name.replace(f".modules_to_save.{adapter_name}.", ".")
    return name.replace(".base_layer", "")
