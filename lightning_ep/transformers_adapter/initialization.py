"""The rules by which a model's own classes draw its random weights."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from lightning_ep.transformers_adapter.record import recall, remember


@dataclass(frozen=True)
class _BuiltWithModel:
    """What is remembered of a module: its model's constructor made it, so the model's rules fill it."""


def note_own_modules(model: PreTrainedModel) -> None:
    """Notes which modules are the model's, before the user adds others (adapters, heads) with rules of their own."""
    for module in model.modules():
        remember(module, _BuiltWithModel())


def own_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that `note_own_modules` has noted."""
    return [module for module in model.modules() if recall(module, _BuiltWithModel) is not None]


def follows_model(module: nn.Module, model: PreTrainedModel, inside: bool, has_rule: bool) -> bool:
    """Whether the rules of a model fill a module inside of it.

    Args:
        module: A submodule of ``model``.
        model: The innermost model around it, or itself.
        inside: Whether the rules of ``model`` fill the module that holds it.
        has_rule: Whether the module's own class has a rule.
    """
    if recall(model, _BuiltWithModel) is not None:
        return recall(module, _BuiltWithModel) is not None
    # A model that user code has built on meta: all that is there may be its constructor's, but for what initialises
    # itself and is neither torch's nor transformers', with what it holds.
    library = type(module).__module__.partition(".")[0] in ("torch", "transformers")
    return inside and (library or isinstance(module, PreTrainedModel) or not has_rule)


def apply_init_rule(owner: PreTrainedModel, module: nn.Module) -> None:
    """Initialises in place what the rule for ``module`` writes to, in it or below, and is not marked as done."""
    owner._init_weights(module)


def allow_resizing_on_meta(model: PreTrainedModel) -> None:
    """Lets `resize_token_embeddings` of a model on meta leave the new rows' values to whoever fills the others."""
    model._init_added_embeddings_weights_with_mean = MethodType(_set_new_rows, model)  # type: ignore[method-assign]


def _set_new_rows(model: Any, old: nn.Module, new: nn.Module, *sizes: int) -> None:
    if not any(param.is_meta for param in new.parameters()):
        type(model)._init_added_embeddings_weights_with_mean(model, old, new, *sizes)


@contextmanager
def marks_are_respected() -> Generator[None, None, None]:
    """Inside, the functions of `torch.nn.init` pass over tensors that are marked, as those of transformers do."""
    with guard_torch_init_functions():
        yield


def mark_initialized(tensor: Tensor) -> Tensor:
    """Marks a tensor so that the initialisation rules leave it alone."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor
