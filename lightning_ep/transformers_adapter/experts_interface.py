"""The experts interface: which function runs a layer's experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lightning_ep.ops.activation import activate_twin
from lightning_ep.ops.expert_form import Activation, ExpertForm
from lightning_ep.ops.registered_experts import ExpertsFunction

_LARGEST = 30.0  # of what gates are tried on, unless they are clamped beyond it


def why_not_fused(module: nn.Module) -> str | None:
    """What keeps an experts module from `FusedExperts`; None if nothing does."""
    form = _form(module)
    return form if isinstance(form, str) else None


def fused_form(module: nn.Module) -> tuple[ExpertForm, tuple[str, ...]]:
    """What `FusedExperts` must know of an experts module that nothing keeps from them, and its parameters in order."""
    form = _form(module)
    assert isinstance(form, ExpertForm), form
    return form, _names(form.activation.gated, form.has_bias)


def _names(gated: bool, biased: bool) -> tuple[str, ...]:
    weights = ("gate_up_proj" if gated else "up_proj", "down_proj")
    return (*weights, *(f"{name}_bias" for name in weights if biased))


def _form(module: nn.Module) -> ExpertForm | str:
    """The form, by the flags that a class declares and by what its activation computes; else what no flag says."""
    if not picks_its_implementation(module):
        return "its class is not declared with `use_experts_implementation`"
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
    declared = {flag: getattr(module, flag) for flag in flags}
    if declared["has_post_expert_norm"]:
        return "its experts end with a norm"
    gated, biased = bool(declared["has_gate"]), bool(declared["has_bias"])
    names = _names(gated, biased)
    if {name for name, _ in module.named_parameters()} != set(names):
        return f"its parameters are not {', '.join(names[:-1])} and {names[-1]}"
    interleaved = gated and not declared["is_concatenated"]
    found = next((how for how in _activations(module, gated, interleaved) if _computes(module, how)), None)
    if found is None:
        return f"its activation is {_activation_name(module)}, which has no fused kernel"
    return ExpertForm(found, bool(declared["is_transposed"]), biased)


def _activations(module: nn.Module, gated: bool, interleaved: bool) -> Iterator[Activation]:
    """What the activation may be, with the numbers that a module holds, the simplest first."""
    alphas = [1.0, *_numbers(module, "alpha", "swiglu_alpha")]
    limits = [None, *_numbers(module, "limit", "swiglu_limit")]
    for limit in limits if gated else limits[:1]:
        for offset in (0.0, 1.0) if gated else (0.0,):
            for alpha in alphas:
                yield Activation("silu", gated, interleaved, alpha, limit, offset)
            yield Activation("gelu_tanh", gated, interleaved, limit=limit, up_offset=offset)
            yield Activation("relu2", gated, interleaved, limit=limit, up_offset=offset)


def _numbers(module: nn.Module, *names: str) -> list[float]:
    values = (getattr(module, name, None) for name in names)
    return [float(value) for value in values if isinstance(value, int | float)]


@torch.no_grad()
def _computes(module: nn.Module, how: Activation) -> bool:
    """Whether the module's activation gives what ``how`` says, tried on numbers on both sides of every clamp."""
    if any(isinstance(child, nn.Module) and any(True for _ in child.parameters()) for child in module.children()):
        return False  # of its own, maybe on meta
    function: Any = module._apply_gate if how.gated else module.act_fn
    largest = max(_LARGEST, 2 * (how.limit or 0.0))
    points = [torch.linspace(-end, end, 25, dtype=torch.float64, device="cpu") for end in (largest, 2.0, 0.1)]
    gate, up = (part.flatten() for part in torch.meshgrid(torch.cat(points), torch.cat(points), indexing="ij"))
    h_1F = torch.stack([gate, up], 1).flatten() if how.interleaved else torch.cat([gate, up])
    plain = torch.ones(1, 1, device="cpu"), torch.zeros(1, dtype=torch.int32, device="cpu")
    expected = activate_twin(h_1F.unsqueeze(0), *plain, how)
    # Some compute in fp32 whatever they are given.
    return torch.allclose(function(h_1F.unsqueeze(0)).double(), expected, rtol=1e-5, atol=1e-5)


def _activation_name(module: nn.Module) -> str:
    function = getattr(module, "act_fn", None)
    if function is None:
        return f"that of {type(module).__name__}"
    return getattr(function, "__name__", type(function).__name__)


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
    if name != "eager" and not picks_its_implementation(module):
        raise ValueError(
            f"experts_implementation={name!r} cannot run {type(module).__name__}, whose class does not say how its "
            "weights lie (`use_experts_implementation` of transformers). Use 'auto', which calls its own forward."
        )
    return _registered(module, name)


def shared_by_experts(module: nn.Module) -> tuple[str, ...]:
    """Names of parameters inside of an experts module that all experts use alike: of a norm behind each of them."""
    if not getattr(module, "has_post_expert_norm", False):
        return ()
    names = module.get_submodule("post_expert_norm").named_parameters()
    return tuple(f"post_expert_norm.{name}" for name, _ in names)


def picks_its_implementation(module: nn.Module) -> bool:
    """Whether the class of the experts has transformers' decorator, which lets a config pick who runs them."""
    return hasattr(module, "is_concatenated") and hasattr(type(module).forward, "__wrapped__")


def _registered(module: nn.Module, name: str) -> ExpertsFunction:
    if not picks_its_implementation(module):
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
