"""The experts interface: which function runs a layer's experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from lightning_ep.ops.registered_experts import ExpertsFunction

FUSED_PARAMETERS = ("gate_up_proj", "down_proj")


def why_not_fused(module: nn.Module) -> str | None:
    """What keeps an experts module from `FusedExperts`, by the flags that its class declares; None if nothing does."""
    if not _picks_its_implementation(module):
        return "its class is not declared with `use_experts_implementation`"
    declared = {
        "has_gate": (True, "its experts have no gate"),
        "has_bias": (False, "its experts have biases"),
        "is_transposed": (False, "its weights are stored transposed"),
        "is_concatenated": (True, "its gate and up projections are interleaved"),
        "has_post_expert_norm": (False, "its experts end with a norm"),
    }
    for flag, (served, reason) in declared.items():
        if getattr(module, flag, None) is not served:
            return reason
    if {name for name, _ in module.named_parameters()} != set(FUSED_PARAMETERS):
        return f"its parameters are not {' and '.join(FUSED_PARAMETERS)}"
    if type(module)._apply_gate is not _default_apply_gate:  # type: ignore[attr-defined]
        return "it has a gate function of its own"
    if not isinstance(module.act_fn, nn.SiLU | SiLUActivation):
        return f"its activation is {type(module.act_fn).__name__}, not SiLU"
    return None


def local_experts_function(module: nn.Module, name: str) -> ExpertsFunction:
    """The function that runs the experts of one device.

    Args:
        module: The experts module.
        name: ``"auto"`` (grouped GEMMs where torch has a kernel, else eager), ``"eager"`` or a name in transformers'
            ``ExpertsInterface``.

    Raises:
        ValueError: If no such implementation is registered.
    """
    if name == "auto":
        return _auto_experts
    names = sorted({"eager", *ALL_EXPERTS_FUNCTIONS})
    if name not in names:
        raise ValueError(
            f"experts_implementation={name!r} is not registered; choose 'auto', 'fused' or one of {names}."
        )
    if name != "eager" and not _picks_its_implementation(module):
        raise ValueError(
            f"experts_implementation={name!r} cannot run {type(module).__name__}, whose class does not say how its "
            "weights lie (`use_experts_implementation` of transformers). Use 'auto', which calls its own forward."
        )
    return _registered(module, name)


def _picks_its_implementation(module: nn.Module) -> bool:
    """Whether the class of the experts has transformers' decorator, which lets a config pick who runs them."""
    return hasattr(module, "is_concatenated") and hasattr(type(module).forward, "__wrapped__")


def _registered(module: nn.Module, name: str) -> ExpertsFunction:
    if not _picks_its_implementation(module):
        return type(module).forward
    # The decorator wraps the model's own (eager) forward.
    eager: ExpertsFunction = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    return ALL_EXPERTS_FUNCTIONS.get_interface(name, eager)


def _auto_experts(module: nn.Module, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    # Grouped GEMMs are fast on CUDA in bf16 with rows of a multiple of 16 bytes; elsewhere they loop too, and the eager
    # experts skip those that received nothing.
    aligned = all(size % 8 == 0 for param in module.parameters(recurse=False) for size in param.shape[1:])
    fast = hidden_TH.is_cuda and hidden_TH.dtype == torch.bfloat16 and aligned
    function = _registered(module, "grouped_mm" if fast else "eager")
    return function(module, hidden_TH, ids_TK, weights_TK)
