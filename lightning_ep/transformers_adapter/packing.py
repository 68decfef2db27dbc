"""Documents packed into a row attend to themselves only, whatever else a model's forward is given.

transformers finds documents by position ids that restart, but looks for them only in calls without a cache and without
a mask. By default a forward makes a cache, in training too, and tokenizers make masks of ones: documents then attend to
each other, without a word.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_masks_for_generate

from lightning_ep.ops.cross_entropy import IGNORE
from lightning_ep.ops.packed_attention import to_device
from lightning_ep.transformers_adapter.attention_interface import (
    attention_implementation,
    forward_source,
    is_flash_attention,
)
from lightning_ep.transformers_adapter.cache_argument import given_cache, takes_cache
from lightning_ep.transformers_adapter.document_bounds import bounds_as_mask, is_causal, takes_bounds
from lightning_ep.transformers_adapter.structure import decoder_layers, model_class, text_model

T = TypeVar("T")

# Of a config's `layer_types`: those with a state, those that make one key of the tokens of a window of the row, and the
# one that takes positions for places in the row.
_RECURRENT = {"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"}
_RECURRENT |= {"compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse"}
_TELLS_POSITIONS = r"""(create_\w*mask\w*|mask_function)\([^()]*position_ids=|["']position_ids["']:"""


@dataclass(frozen=True)
class Packing:
    """What positions and mask of a batch say about documents.

    Attributes:
        packed: Whether a document begins inside a row. Without a mask it does wherever positions do not go on by one,
            as transformers has it. With one, where those of two tokens that count do not increase: what stands at
            padding says nothing.
        gaps: Whether a mask tells of padding before or between the tokens that count, or labels count at padding. Else
            no token that counts sees padding: causality and the positions of packed documents say all that a mask does.
        bounds: int32 ``[N + 1]`` in host memory, where the N documents begin in the rows put one after the other, and
            their end; None where none is packed.
        longest: Tokens of the longest one, 0 without ``bounds``.
    """

    packed: bool = False
    gaps: bool = False
    bounds: Tensor | None = field(default=None, compare=False)
    longest: int = field(default=0, compare=False)

    @staticmethod
    def of(position_ids: Tensor | None, attention_mask: Tensor | None, labels: Any = None) -> Packing:
        """Reads ``[B or 1, S]`` positions, a ``[B, S]`` mask and labels; for tensors on a GPU the host waits."""
        counts = None if attention_mask is None else attention_mask.cpu().bool()
        gaps = counts is not None and bool((counts[:, 1:] & ~counts[:, :-1]).any())
        alone = Packing(gaps=gaps or learns_padding(counts, labels))
        if position_ids is None:
            return alone
        steps = position_ids.cpu().diff(dim=-1)
        begins = steps != 1 if counts is None else (steps <= 0) & counts[:, 1:] & counts[:, :-1]
        if not bool(begins.any()):
            return alone
        bounds = bounds_of(steps != 1)
        return Packing(True, gaps, bounds, int(bounds.diff().max()))

    def refuse_gaps(self) -> None:
        """Raises ValueError if documents are packed beside padding that a mask has to describe."""
        if self.packed and self.gaps:
            raise ValueError(
                "The batch has position_ids that restart inside a row, as those of packed documents do, and an "
                "attention_mask with padding before or between the tokens that count, so that it is not clear which of "
                "them belong together. Pad on the right, or leave the attention_mask out: position_ids that restart at "
                "the padding (0, 1, 2, ...) make it a document of its own."
            )


def learns_padding(counts: Tensor | None, labels: Any) -> bool:
    """Whether a label counts where a mask says padding, as in a copy of the ids: it matters then what is seen there."""
    if counts is None or not isinstance(labels, Tensor) or labels.shape != counts.shape:
        return False
    return bool(((labels.cpu() != IGNORE) & ~counts).any())


def bounds_of(begins: Tensor) -> Tensor:
    """Where runs of tokens begin in rows put one after the other, and their end: int32 ``[N + 1]``.

    Args:
        begins: bool ``[B, S - 1]`` in host memory, whether one begins behind a token. With every row one does.
    """
    begins_BS = torch.cat([torch.ones_like(begins[:, :1]), begins], dim=1)
    starts_N = begins_BS.flatten().nonzero().flatten()
    return torch.cat([starts_N, starts_N.new_tensor([begins_BS.numel()])]).int()


def filling(ids_BS: Tensor, positions_BS: Tensor, of_longer: bool = False) -> Tensor:
    """What fills windows of packed documents up: equal tokens to the end of the row, from where positions restart.

    Of such windows nothing else says so. Padding is a document to attention, or several, and its token may be the one
    that ends documents, which counts where it does. Of rows that are pieces ``of_longer`` ones it may fill the whole.
    """
    equal_BS = (ids_BS != ids_BS[:, -1:]).flip(1).cumsum(1).flip(1) == 0
    begun_BS = ((positions_BS == 0) & equal_BS).cumsum(1) > 0
    return equal_BS & (begun_BS | equal_BS[:, :1]) if of_longer else begun_BS


class ReadOnHost(Generic[T]):
    """What the host has read of batches that are in use, while what describes them is as it was then."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def note(self, batch: Any, found: T) -> None:
        """Keeps what was found for a batch that is on the device by now."""
        positions, mask = described(batch)
        if (key := mask if positions is None else positions) is not None:
            self._known[key] = _identity(positions), _identity(mask), found

    def of(self, position_ids: Tensor | None, attention_mask: Tensor | None) -> T | None:
        """What was found for these two, None if it is not known, or one of them has been changed since."""
        key = attention_mask if position_ids is None else position_ids
        *then, found = self._known.get(key, (None, None)) if key is not None else (None, None)
        return found if then == [_identity(position_ids), _identity(attention_mask)] else None


def described(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """The tensors of a batch that may describe documents: its position ids and its mask."""
    if not isinstance(batch, Mapping):
        return None, None
    positions, mask = (batch.get(name) for name in ("position_ids", "attention_mask"))
    return positions if isinstance(positions, Tensor) else None, mask if isinstance(mask, Tensor) else None


def _identity(tensor: Tensor | None) -> Any:
    """A tensor as it is now; nothing equals one of inference mode, of which nobody notes changes."""
    if tensor is None:
        return None
    return object() if tensor.is_inference() else (WeakIdRef(tensor), tensor._version)


_PACKING: ReadOnHost[Packing] = ReadOnHost()


def packing_of(batch: Any) -> Packing | None:
    """What a batch that is still in host memory says about documents and padding; None if nothing."""
    positions, mask = described(batch)
    if not all(tensor is None or tensor.is_cpu for tensor in (positions, mask)):
        return None
    positions = _in_text(positions)
    if _readable(positions, mask):
        return Packing.of(positions, mask, batch.get("labels"))
    return Packing.of(None, mask, batch.get("labels")) if _says_of_each(mask) else None


def note_packing(batch: Any, packing: Packing) -> None:
    """Spares the forwards that get this batch, on the device by now, to wait for what the host has read already."""
    _PACKING.note(batch, packing)


def document_lengths(batch: Any) -> list[int] | None:
    """Tokens of each document in a batch, as the host has read it or can without waiting; None if none are packed."""
    found = _PACKING.of(*described(batch)) or packing_of(batch)
    return None if found is None or found.bounds is None else found.bounds.diff().tolist()


def _in_text(position_ids: Any) -> Any:
    """Places in the text alone, of those that have time, height and width behind them: ``[4, B, S]``."""
    several = isinstance(position_ids, Tensor) and position_ids.ndim == 3 and position_ids.shape[0] == 4
    return position_ids[0] if several else position_ids


def _says_of_each(attention_mask: Any) -> bool:
    """Whether it is a mask that says of every token whether it counts."""
    return isinstance(attention_mask, Tensor) and attention_mask.ndim == 2


def _readable(position_ids: Any, attention_mask: Any) -> bool:
    """Whether these are the positions of several tokens, with no mask or one that says of each whether it counts."""
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape[1] < 2:
        return False
    if attention_mask is None:
        return True
    return isinstance(attention_mask, Tensor) and attention_mask.shape[1:] == position_ids.shape[1:]


# ------------------------------------------------------------------------------------------------ forwards of a model


def keep_documents_apart(model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Has every forward of a model, or of one inside it, see packed documents as such.

    Such a forward makes no cache, since nothing could go on from one (nor does one in training, unless it is asked to),
    and passes its layers no mask of tokens that count, which the positions replace. Of batches that `note_packing` was
    called for, layers get no mask either that tells of padding behind the tokens that count alone: causality says as
    much to them, and attention is several times as fast without. Models with a head keep the mask, by which balancing
    losses leave padding out.
    Calls that go on from a cache, as in `generate`, and those that number the positions themselves are not touched.

    Args:
        model: A model.
        dtype: What it computes in, for masks that say the same. Default: the dtype of its weights.
    """
    for child in model.modules():
        if not isinstance(child, PreTrainedModel) or child.base_model is not child:
            continue
        names = list(inspect.signature(child.forward).parameters)
        if "position_ids" in names and takes_cache(names):
            found = _recurrent(child), is_causal(child), _looks_for_documents(child), _reads_bounds(child)
            forward = _Forward(names, *found, dtype or child.dtype)
            child.register_forward_pre_hook(partial(_enter, forward), with_kwargs=True)


@dataclass(frozen=True)
class _Forward:
    """What must be known of a model's forward.

    Attributes:
        names: Its parameters, in order.
        recurrent: The layers that pass on a state from token to token, whatever a mask says; None if there are none.
        causal: Whether padding behind the tokens that count makes no difference to them, and a mask says no more.
        looks: Whether it looks for documents where there is no mask and no cache.
        reads_bounds: Whether layers that pass on a state read ``cu_seq_lens_q``, as FlashAttention does and no other.
        dtype: What the model computes in.
    """

    names: list[str]
    recurrent: str | None
    causal: bool
    looks: bool
    reads_bounds: bool
    dtype: torch.dtype


def _recurrent(model: PreTrainedModel) -> str | None:
    types = _RECURRENT & set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if types:
        return f"of the types {sorted(types)}"
    text = decoder_layers(text_model(model))  # a tower for sound may have convolutions
    layers = [layer for layer in text if any(isinstance(m, nn.Conv1d) for m in layer.modules())]
    return f"with a convolution ({type(layers[0]).__name__})" if layers else None


def _looks_for_documents(model: PreTrainedModel) -> bool:
    """Most families tell the function that makes their masks of the positions; gpt-oss and a few more do not."""
    return re.search(_TELLS_POSITIONS, forward_source(model_class(model))) is not None  # type: ignore[arg-type]  # hashable


def _reads_bounds(model: PreTrainedModel) -> bool:
    classes: set[Any] = {type(module) for layer in decoder_layers(model) for module in layer.modules()}
    return any("cu_seq_lens_q" in forward_source(cls) for cls in classes)


def _enter(
    forward: _Forward, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The forward pre-hook: what is to be called instead, None for a call that may stay as it is."""
    call = {**dict(zip(forward.names, args, strict=False)), **kwargs}
    tokens: Any = call.get("inputs_embeds") if call.get("input_ids") is None else call["input_ids"]
    if isinstance(tokens, Tensor) and 0 in tokens.shape[:2]:
        raise ValueError(
            f"{type(model).__name__} was called without tokens ({tuple(tokens.shape)}), on which transformers cannot "
            "run, and every rank takes part in every step. Leave empty samples out of the data, or put in a token "
            "whose label is -100."
        )
    positions: Any = call.get("position_ids")
    mask, past = call.get("attention_mask"), given_cache(call)
    given, positions = positions, _in_text(positions)
    name, bounds = attention_implementation(text_model(model)), call.get("cu_seq_lens_q") is not None
    if name not in ALL_MASK_ATTENTION_FUNCTIONS or (past is not None and past.get_seq_length() > 0):
        return None  # it does without masks, as that of `cp`, which is told of documents otherwise
    flash, by_bounds = is_flash_attention(name), takes_bounds(name)
    if bounds and not flash and positions is None:
        raise ValueError(
            f"cu_seq_lens_q alone says nothing to attention {name!r}, in which documents would attend to each other. "
            "Add position_ids that restart at every document."
        )
    readable = _readable(positions, mask)
    read = (readable or _says_of_each(mask)) and not torch.compiler.is_compiling()
    known = _PACKING.of(given, mask) if read else None
    spared = _changed(forward.names, args, kwargs, _spared(forward, model, call, known))
    if not readable:
        return spared
    without_documents = None
    if mask is None and past is None and forward.looks and forward.recurrent is None and not flash:
        # transformers keeps documents apart, unless there is a cache; without gradients a call may be for the cache.
        asked = call.get("use_cache")
        if asked is None and (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            without_documents = _changed(forward.names, args, kwargs, {"use_cache": False})
        if (asked is False or without_documents is not None) and not by_bounds:
            return without_documents
    # Convolutions before such a layer's state read `seq_idx` alone.
    by_layers = forward.reads_bounds and call.get("seq_idx") is not None
    told = bounds and (forward.recurrent is None or by_layers)
    if torch.compiler.is_compiling() or (told and flash):
        return without_documents
    found = known or Packing.of(positions, mask)
    if not found.packed:
        return spared or without_documents
    found.refuse_gaps()
    _refuse(model, None if told else forward.recurrent, past)
    if positions.shape[:2] != tokens.shape[:2]:
        positions = positions.expand(tokens.shape[:2])
        found = Packing.of(positions, mask)
    assert found.bounds is not None
    new: dict[str, Any] = {"use_cache": False, "attention_mask": None}
    if flash:
        on_device, longest = to_device(found.bounds, tokens.device), found.longest
        new |= {"cu_seq_lens_q": on_device, "cu_seq_lens_k": on_device}
        new |= {"max_length_q": longest, "max_length_k": longest}
    elif by_bounds:
        new["attention_mask"] = bounds_as_mask(to_device(found.bounds, tokens.device), found.longest)
    elif not forward.looks:
        # Not in a wider one, whose smallest number FSDP would cast to -inf, nor in a narrower one: some models put the
        # smallest number of their own into it.
        like = tokens.new_empty((*tokens.shape[:2], 0), dtype=forward.dtype)
        new["attention_mask"] = create_masks_for_generate(model.config, like, None, None, positions)
    return _changed(forward.names, args, kwargs, new)


def _spared(
    forward: _Forward, model: PreTrainedModel, call: Mapping[str, Any], known: Packing | None
) -> dict[str, Any]:
    """What a call without packed documents does without: a cache that is for nothing, a mask that says nothing."""
    past, asked = given_cache(call), call.get("use_cache")
    trains = model.training and torch.is_grad_enabled() and past is None and "use_cache" in forward.names
    # A cache would be for nothing, and layers would be compiled each for itself, of which torch allows eight.
    new: dict[str, Any] = {"use_cache": False} if trains and asked is None else {}
    without_cache = past is None and (asked is False or bool(new))
    # Of a batch that was read with its labels: the call alone does not say whether they count at padding.
    plain = known is not None and not known.gaps and forward.causal
    if plain and without_cache and call.get("attention_mask") is not None:
        new["attention_mask"] = None
    return new


def _refuse(model: PreTrainedModel, recurrent: str | None, past: Any) -> None:
    """Raises ValueError for packed documents that cannot be kept apart."""
    what = "position_ids restart inside a row, as those of packed documents do, but"
    if recurrent is not None:
        raise ValueError(
            f"{what} {type(model).__name__} has layers {recurrent}: documents would see what came before them "
            "in the row. Give every document a row of its own (padded on the right)."
        )
    if past is not None:
        raise ValueError(
            f"{what} past_key_values is a cache to fill, and nothing can go on from a cache of several documents. "
            "Leave past_key_values out, or give every document a row of its own."
        )


def _changed(
    names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], new: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A call with other values of these arguments, wherever they are; None without any."""
    if not new:
        return None
    positional = list(args)
    for index in range(len(args)):
        if names[index] in new:
            positional[index] = new[names[index]]
    return tuple(positional), {**kwargs, **{k: v for k, v in new.items() if k not in names[: len(args)]}}
