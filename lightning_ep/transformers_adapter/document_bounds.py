"""Models whose attention is told where documents begin, in place of a mask of all pairs of tokens.

A mask is what reaches every attention layer of every family, also one that is compiled, or replayed in backward; and a
mask of four dimensions a model takes for made and passes on as it is. So bounds travel as one, of integers.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_ep.ops.packed_attention import attend_documents, documents_mask, kernel_serves
from lightning_ep.transformers_adapter.attention_interface import (
    attention_implementation,
    attention_sources,
    forward_source,
    is_flash_attention,
    select_attention,
    whole_sequence_mixers,
    why_not_causal,
)
from lightning_ep.transformers_adapter.structure import decoder_layers, model_class, text_model

_NAME = "packed_sdpa"
_MAKES_MASKS = r"create_(sliding_window_)?causal_mask\b"
_MAKES_ANY_MASK = r"create_\w*mask|mask_function"
_ADDS_TO_MASKS = r"(and|or)_mask_function=|block_sequence_ids="
_TOLD_MORE = r"(softcap|position_bias|s_aux)="
_ASKS_FOR_THE_NAME = r"_attn_implementation (==|!=|in|not in) "


def use_bounds_of_documents(model: PreTrainedModel) -> None:
    """From now on attention of packed documents costs their pairs alone, unless `why_not_bounds` says why not.

    For models that compute where `lightning_ep.ops.packed_attention.has_kernel`; elsewhere every layer would make a
    mask of its own. Other batches are attended to as before.
    """
    if why_not_bounds(model) is None:
        select_attention(text_model(model), _NAME, _packed_sdpa, masks_of="sdpa")


def why_not_bounds(model: PreTrainedModel) -> str | None:
    """What keeps a model's attention from being told bounds of documents in place of a mask, None if nothing does."""
    if makes_masks_around_text(model):
        return "what is around its text model makes masks"
    model = text_model(model)
    if (name := attention_implementation(model)) != "sdpa":
        return f"its attention implementation is {name!r}"
    if (reason := why_not_causal(model)) is not None:
        return reason
    if getattr(model.config, "attention_dropout", 0):
        return "it has dropout of attention, which the kernel has not"
    if not _makes_plain_masks(model):
        return "its masks say more than which tokens are before others in their documents"
    sources = [source for layer in decoder_layers(model) for source in attention_sources(layer)]
    if any(re.search(_TOLD_MORE, source) for source in sources):
        return "its attention adds to its scores or changes them"
    if re.search(_ASKS_FOR_THE_NAME, _file_source(model)):
        return "its code asks for the name of the attention implementation"
    return None


def is_causal(model: PreTrainedModel) -> bool:
    """Whether padding behind all tokens that count makes no difference to these, and a mask can say no more than that.

    Attention sees what is before a token, and convolutions and linear attention pass a state on from token to token.
    """
    return why_not_causal(model, whole_sequence_mixers(model)) is None and _makes_plain_masks(model)


def _makes_plain_masks(model: PreTrainedModel) -> bool:
    """Whether masks that a model makes say which tokens are before others, documents and padding, and nothing else."""
    forward = forward_source(model_class(model.base_model))  # type: ignore[arg-type]  # hashable
    return re.search(_MAKES_MASKS, forward) is not None and re.search(_ADDS_TO_MASKS, forward) is None


def makes_masks_around_text(model: PreTrainedModel) -> bool:
    """Whether the parts around a model's text say who sees whom in it, as where tokens of an image see one another."""
    text, around = text_model(model), (model, model.base_model)
    sources = [forward_source(model_class(outer)) for outer in around if outer is not text]  # type: ignore[arg-type]  # hashable
    return text not in around and any(re.search(_MAKES_ANY_MASK, source) for source in sources)


def is_told_documents(model: PreTrainedModel) -> bool:
    """Whether packed documents cost attention no mask, since it is told their bounds, or those of FlashAttention."""
    name = attention_implementation(text_model(model))
    return takes_bounds(name) or is_flash_attention(name)


def takes_bounds(name: str) -> bool:
    """Whether an attention implementation takes what `bounds_as_mask` makes."""
    return name == _NAME


def bounds_as_mask(bounds: Tensor, longest: int) -> Tensor:
    """What goes to the model as its mask: int32 ``[1, 1, longest, N + 1]``, of which only ``bounds`` is in memory.

    The length of the longest document is a size, since torch.compile takes sizes for variable when it is told so, and
    would compile again for another number.
    """
    mask = bounds.expand(1, 1, longest, -1)
    torch._dynamo.maybe_mark_dynamic(mask, [2, 3])
    return mask


def _packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' ``sdpa``, and attention over documents where bounds come as the mask."""
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        bounds, longest = attention_mask[0, 0, 0], attention_mask.shape[2]
        batch, _, length, _ = query.shape
        window = sliding_window if sliding_window is not None and sliding_window < length else None
        if kernel_serves(query, value, dropout):
            return attend_documents(query, key, value, bounds, longest, scaling, window), None
        attention_mask = documents_mask(bounds, batch, length, window)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
    )


def _file_source(model: PreTrainedModel) -> str:
    """The code of a model's file, empty where there is none."""
    try:
        return inspect.getsource(sys.modules[model_class(model).__module__])
    except OSError:
        return ""
