"""The rules by which a model's own classes draw its random weights."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def init_rules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Every submodule with the model whose initialisation rules are responsible for it."""
    owners: dict[str, PreTrainedModel] = {}
    for name, child in model.named_modules():
        owner = child if isinstance(child, PreTrainedModel) else owners[name.rpartition(".")[0]]
        owners[name] = owner
        yield name, child, owner


def apply_init_rule(owner: PreTrainedModel, module: nn.Module) -> None:
    """Initialises in place the parameters and buffers of ``module`` that are not marked as done."""
    owner._init_weights(module)


def allow_resizing_on_meta(model: PreTrainedModel) -> None:
    """Lets `resize_token_embeddings` of a model on meta leave the new rows' values to whoever fills the others."""
    model._init_added_embeddings_weights_with_mean = MethodType(_set_new_rows, model)  # type: ignore[method-assign]


def _set_new_rows(model: Any, old: nn.Module, new: nn.Module, *sizes: int) -> None:
    if not any(param.is_meta for param in new.parameters()):
        type(model)._init_added_embeddings_weights_with_mean(model, old, new, *sizes)


def mark_initialized(tensor: Tensor) -> Tensor:
    """Marks a tensor so that the initialisation rules leave it alone."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor
