"""The attention interface and its masks, and which models let their attention be split over ranks."""

from __future__ import annotations

import ast
import inspect
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    padding_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_ep.transformers_adapter.structure import decoder_layers

CONTEXT_PARALLEL = "context_parallel_"
"""Before the name of the attention implementation inside, where sequences are split."""

_SOFTMAX = {"full_attention", "sliding_attention"}  # of a config's `layer_types`
_GATHERED = {"linear_attention", "conv"}


def attention_heads(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers of query heads and of key/value heads; where layers differ, what divides those of all."""
    config = model.config.get_text_config()
    layers: list[Any] = [config]
    if config.is_heterogeneous:
        layers = [config.per_layer_config[index] for index in range(config.num_hidden_layers)]
    heads = [layer.num_attention_heads for layer in layers]
    kv_heads = [getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads for layer in layers]
    return math.gcd(*heads), math.gcd(*kv_heads)


def attention_implementation(model: PreTrainedModel) -> str:
    """The name of the attention implementation that the model uses."""
    return model.config._attn_implementation or "eager"


def is_context_parallel(model: PreTrainedModel) -> bool:
    """Whether the model's sequences are split, and not whole for the moment."""
    return attention_implementation(model).startswith(CONTEXT_PARALLEL)


def select_attention(
    model: PreTrainedModel, name: str, function: Callable[..., Any] | None = None, masks_of: str | None = None
) -> None:
    """Makes the model use the attention of this name, registered with ``function`` if one is given.

    A registered name gets the masks of the implementation ``masks_of``. Without one it gets no mask from the model:
    ``function`` has to know what it attends to.
    """
    if function is not None:
        AttentionInterface.register(name, function)
    if masks_of is not None:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[masks_of])
    model.config._attn_implementation = name


def config_with_attention(config: Any, name: str) -> Any:
    """A shallow copy of the config that names this attention implementation."""
    config = copy(config)
    config._attn_implementation = name
    return config


def attention_function(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function of this name; ``eager`` is the one of the module's own file."""
    files = (sys.modules[cls.__module__] for cls in type(module).__mro__)
    eager = next((file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward")), None)
    assert eager is not None or name != "eager"
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[arg-type]


def is_flash_attention(name: str) -> bool:
    """Whether an attention implementation takes bounds of documents (``cu_seq_lens``) instead of a mask."""
    return name != "eager" and ALL_ATTENTION_FUNCTIONS.get(name) is flash_attention_forward


def causal_mask(
    name: str,
    batch: int,
    length: int,
    window: int | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """The mask that `create_causal_mask` would make, without waiting for the device.

    Args:
        name: The attention implementation.
        batch: Number of rows.
        length: Tokens per row.
        window: Sliding window, or None.
        position_ids: ``[B, S]``, which restart where a document begins; without effect if there is a mask.
        attention_mask: ``[B, S]``, zero at padding.
        dtype: Of the attention scores.
        device: Where the mask goes.
    """
    allowed = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    if attention_mask is not None:
        allowed = and_masks(allowed, padding_mask_function(attention_mask.bool()))
    elif position_ids is not None:
        documents = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
        allowed = and_masks(allowed, packed_sequence_mask_function(documents))
    return ALL_MASK_ATTENTION_FUNCTIONS[name](
        batch_size=batch,
        q_length=length,
        kv_length=length,
        mask_function=allowed,
        allow_is_causal_skip=False,
        dtype=dtype,
        device=device,
    )


@contextmanager
def without_packing() -> Iterator[None]:
    """For forwards of models that number the positions themselves: each row of the batch is one sequence.

    transformers looks for packed sequences in the position ids that it has just made, and the host waits for the answer
    of the GPU in every forward. It has no argument that says so.
    """
    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found


def why_not_context_parallel(model: PreTrainedModel) -> str | None:
    """What keeps a model's sequences from being split over ranks, None if nothing does.

    Exact attention over pieces needs every exchange between tokens to be that of `why_not_causal`, or one of
    `whole_sequence_mixers`, and every other computation to need nothing but a token and its position.
    """
    if (reason := why_not_causal(model, whole_sequence_mixers(model))) is not None:
        return reason
    if model.loss_type not in (None, "ForCausalLM"):
        return f"its loss ({model.loss_type}) is not one of next tokens"
    if rope := _length_dependent_rope(model.config):
        return f"its rotary frequencies (rope_type={rope!r}) depend on the longest position of a rank's piece"
    return None


def why_not_causal(model: PreTrainedModel, mixers: Mapping[str, nn.Module] | None = None) -> str | None:
    """What keeps tokens from seeing each other in causal attention alone that the attention interface is told all of.

    None if nothing does: every exchange between tokens is softmax attention over the tokens before, or a window of
    them, and documents or padding are all that a mask could add.

    Args:
        model: The model.
        mixers: Those of `whole_sequence_mixers`, to allow for what they exchange. Default: none.
    """
    gathered = (mixers or {}).values()
    types = _SOFTMAX | (_GATHERED if gathered else set())
    config = model.config
    other_types = set(getattr(config, "layer_types", None) or ()) - types
    if config.get_text_config() is not config:
        return "it has parts other than a language model, whose inputs are no tokens"
    if not (gathered or model._supports_attention_backend):  # a flag that no hybrid sets; layers are read below
        return "its attention does not go through transformers' attention interface"
    if other_types:
        return (
            f"it has layers of the types {sorted(other_types)}, and only softmax attention over all keys can be split"
            + (", or linear attention behind a convolution" if types >= _GATHERED else "")
        )
    if not getattr(config, "is_causal", True):
        return "its attention is not causal"
    if (name := attention_implementation(model)) not in ALL_MASK_ATTENTION_FUNCTIONS:
        return f"it is not known which masks its attention implementation {name!r} takes"
    has_windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    sliding = bool(getattr(config, "sliding_window", None)) or has_windows
    inside = {module for mixer in gathered for module in mixer.modules()}
    return next((reason for layer in decoder_layers(model) if (reason := _why_not_split(layer, sliding, inside))), None)


def whole_sequence_mixers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Parts of layers that mix tokens by a convolution, with or without a linear attention behind it, by name.

    They are told hidden states and padding and nothing of positions, so that whole sequences are all that they need.
    """
    names = {module: name for name, module in model.named_modules()}
    found = [part for layer in decoder_layers(model) for part in _whole_sequence_mixers(layer)]
    return {names[part]: part for part in found}


def _whole_sequence_mixers(layer: nn.Module) -> Iterator[nn.Module]:
    for name, part in layer.named_children():
        if not any(isinstance(module, nn.Conv1d) for module in part.modules()) or attention_sources(part):
            continue
        takes = inspect.signature(type(part).forward).parameters.keys()
        told = {"hidden_states", "attention_mask"} <= takes and not {"position_ids", "position_embeddings"} & takes
        if told and _passes_all_on(type(layer), name):  # type: ignore[arg-type]  # hashable
            yield part


@cache
def _passes_all_on(layer: Any, name: str) -> bool:
    """Whether a layer calls its part of this name with all other arguments that it gets."""
    source = textwrap.dedent(forward_source(layer))
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func) == f"self.{name}"]
    return bool(calls) and all(any(keyword.arg is None for keyword in call.keywords) for call in calls)


def _why_not_split(layer: nn.Module, sliding: bool, gathered: set[nn.Module]) -> str | None:
    name, modules = type(layer).__name__, [module for module in layer.modules() if module not in gathered]
    attention = attention_sources(layer)
    others = [type(m).__name__ for m in modules if isinstance(m, nn.Conv1d) or "Indexer" in type(m).__name__]
    if not attention and len(modules) == len(list(layer.modules())):
        return f"its {name} has no attention that goes through transformers' attention interface"
    if others:
        return f"its {name} lets tokens see each other outside of attention ({others[0]})"
    if sliding and not all("sliding_window=" in source for source in attention):
        return f"the attention of its {name} has a sliding window of which it does not tell its implementation"
    if not all(getattr(module, "is_causal", True) for module in modules):
        return f"the attention of its {name} is not causal"
    return None


def attention_sources(layer: nn.Module) -> list[str]:
    """The code of the modules of a layer that call the attention interface."""
    sources = (forward_source(type(module)) for module in layer.modules())  # type: ignore[arg-type]  # hashable
    return [source for source in sources if "ALL_ATTENTION_FUNCTIONS" in source]


def _length_dependent_rope(config: Any) -> str | None:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    types = [str(entry.get("rope_type")) for entry in nested]
    return next((name for name in types if "dynamic" in name or name == "longrope"), None)


@cache
def forward_source(cls: Any) -> str:
    """The source of a class's forward, empty where there is none: nobody can tell what it does."""
    try:
        return inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return ""
