"""Attention of whole sequences by ranks that hold pieces of them, around the implementation that the model had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.context_parallel.exchange import gather_tokens, kv_repeats, scatter_tokens
from lightning_ep.context_parallel.mixers import gather_around_mixers
from lightning_ep.context_parallel.sequence import KEY, NO_PIECE, SequencePiece
from lightning_ep.layout import ParallelLayout
from lightning_ep.ops.packed_attention import attend_documents, kernel_serves


def check(model: PreTrainedModel, layout: ParallelLayout) -> None:
    """Raises ValueError, before anything is sharded, if sequences of this model cannot be split over ``layout.cp``."""
    if (reason := adapter.why_not_context_parallel(model)) is not None:
        raise ValueError(
            f"cp={layout.cp} cannot serve {type(model).__name__} ({model.config.model_type!r}): {reason}. Use cp=1; "
            "ep, fsdp and replicate have no such rule."
        )
    layout.check_attention_heads(*adapter.attention_heads(model), type(model).__name__)


def use_context_parallel_attention(model: PreTrainedModel) -> None:
    """From now on attention expects a `SequencePiece` and runs the implementation that the model had inside.

    What else mixes tokens gets all of them: see `gather_around_mixers`.
    """
    inner = adapter.attention_implementation(model)
    if not inner.startswith(adapter.CONTEXT_PARALLEL):
        adapter.select_attention(model, adapter.CONTEXT_PARALLEL + inner, _attention(inner))
        gather_around_mixers(model)


@contextmanager
def whole_sequences(module: nn.Module) -> Iterator[None]:
    """Inside, every rank runs the sequences that it is given by itself, as without ``cp``; for `generate`.

    Ranks that share batches must be given the same. Does nothing to models that are not context-parallel.

    Args:
        module: A transformers model, or a module that contains some.
    """
    names = {m: adapter.attention_implementation(m) for m in adapter.pretrained_models(module).values()}
    names = {model: name for model, name in names.items() if name.startswith(adapter.CONTEXT_PARALLEL)}
    for model, name in names.items():
        adapter.select_attention(model, name.removeprefix(adapter.CONTEXT_PARALLEL))
    try:
        yield
    finally:
        for model, name in names.items():
            adapter.select_attention(model, name)


def _attention(inner: str) -> Callable[..., tuple[Tensor, None]]:
    """The function that transformers' attention interface calls; the exchanges stay out of compiled graphs."""

    @torch.compiler.disable
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        piece = kwargs.pop(KEY, None)
        if not isinstance(piece, SequencePiece):
            raise RuntimeError(NO_PIECE)
        _refuse_local_facts(module, query, attention_mask, piece, kwargs)
        kwargs.pop("position_ids", None)  # this rank's; the piece has them all
        layer = f"attention {getattr(module, 'layer_idx', '')}".rstrip()
        local = _LocalHeads(module, inner, query.shape[1], key.shape[1], piece)
        if (sinks := kwargs.get("s_aux")) is not None:
            kwargs["s_aux"] = local.of_heads(sinks)
        q_BHSD, k_BHSD, v_BHSD = gather_tokens(query, key, value, piece.peers, layer)
        out_BSHD = _attend(local, inner, q_BHSD, k_BHSD, v_BHSD, piece, **kwargs)
        return scatter_tokens(out_BSHD, piece.peers, layer), None

    return attention


def _refuse_local_facts(
    module: nn.Module, query: Tensor, attention_mask: Tensor | None, piece: SequencePiece, kwargs: dict[str, Any]
) -> None:
    """Raises for what describes this rank's tokens only, or was made for other tokens."""
    name = type(module).__name__
    if query.shape[2] * piece.peers.size != piece.length or query.shape[0] != piece.batch:
        raise RuntimeError(
            f"{name} got {query.shape[0]} x {query.shape[2]} tokens, but the piece of sequences that came with it is "
            f"{piece.batch} x {piece.length // piece.peers.size}. Pass the tokens and the piece of one "
            "`shard_sequence` call, unchanged."
        )
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        raise RuntimeError(
            f"{name} has a mask or bias of its own, made from this rank's tokens. With cp > 1 only causal attention of "
            "documents and padding is supported, as position_ids and a 2-D attention_mask describe them."
        )
    causal = kwargs.get("is_causal")
    if not (causal if causal is not None else getattr(module, "is_causal", True)):
        raise RuntimeError(f"{name} is not causal, which cp > 1 does not support.")


class _LocalHeads:
    """The attention module as its implementation sees it on a rank that has only some of the heads."""

    def __init__(self, module: nn.Module, inner: str, heads: int, kv_heads: int, piece: SequencePiece) -> None:
        size = piece.peers.size
        if heads % size != 0:
            raise RuntimeError(f"cp={size} does not divide the {heads} heads of {type(module).__name__} on this rank.")
        self._module, self._inner = module, inner
        self._heads = slice(piece.peers.rank * heads // size, (piece.peers.rank + 1) * heads // size)
        self.num_key_value_groups = heads // (kv_heads * kv_repeats(kv_heads, size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def of_heads(self, values: Tensor) -> Tensor:
        """This rank's part of one value per head."""
        return values[self._heads]

    @property
    def sinks(self) -> Tensor | None:
        """Attention sinks, one per head, of the families and layers that have them."""
        sinks: Any = self._module.sinks
        return None if sinks is None else self.of_heads(sinks)

    @property
    def config(self) -> Any:
        """With the name of the implementation inside, by which it finds its kernels."""
        return adapter.config_with_attention(self._module.config, self._inner)


def _attend(
    module: _LocalHeads,
    inner: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    piece: SequencePiece,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention of whole sequences, ``[B, S, heads, Dv]``."""
    documents = piece.documents
    window = sliding_window if sliding_window is not None and sliding_window < piece.length else None
    plain = documents.plain and window is None
    if inner == "sdpa" and not plain and not documents.gaps and kernel_serves(query, value, dropout):
        bounds, longest = piece.bounds, documents.longest
        if bounds is None:  # a window in rows that are whole
            longest = piece.length
            bounds = torch.arange(piece.batch + 1, dtype=torch.int32, device=query.device) * longest
        return attend_documents(query, key, value, bounds, longest, scaling, window)
    mask = None
    if adapter.is_flash_attention(inner):
        if documents.gaps:
            mask = piece.attention_mask
        elif piece.bounds is not None:
            kwargs |= {"cu_seq_lens_q": piece.bounds, "cu_seq_lens_k": piece.bounds}
            kwargs |= {"max_length_q": documents.longest, "max_length_k": documents.longest}
    elif not (inner == "sdpa" and plain):  # to which no mask means causal, and its fastest kernels
        mask = _mask(inner, query, piece, window)
    function = adapter.attention_function(inner, module._module)
    out, _ = function(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, sliding_window=sliding_window, **kwargs
    )
    return out


def _mask(inner: str, query: Tensor, piece: SequencePiece, window: int | None) -> Any:
    """The mask of the whole sequences in the implementation's own form, built once for all layers alike."""
    key = (inner, window, query.dtype, query.device)
    if key not in piece.masks:
        piece.masks[key] = adapter.causal_mask(
            inner,
            query.shape[0],
            piece.length,
            window,
            None if piece.documents.plain else piece.position_ids,
            None if piece.documents.plain else piece.attention_mask,
            query.dtype,
            query.device,
        )
    return piece.masks[key]
