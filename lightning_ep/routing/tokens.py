"""Which tokens of a pass through a model are no padding, in the order in which routers see them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.context_parallel.sequence import KEY, SequencePiece, piece_of
from lightning_ep.layout import ParallelLayout


class Tokens:
    """What is known of the tokens of one pass.

    Args:
        counted_BS: Bool, which tokens are no padding; None where all are, or where nothing was said of them.
    """

    def __init__(self, counted_BS: Tensor | None) -> None:
        self._counted_T = None if counted_BS is None else counted_BS.flatten()
        self._ones: dict[tuple[int, int], Tensor] = {}

    def counted(self, rows: int) -> Tensor | None:
        """Bool ``[T]``; None where all of these count: layers beside the text (a tower) have other tokens."""
        return self._counted_T if self._counted_T is not None and self._counted_T.numel() == rows else None

    def ones(self, ids_TK: Tensor) -> Tensor:
        """int64 ``[T K]``, 1 for each choice of a token that counts, else 0; made once for all layers."""
        rows, top_k = ids_TK.shape
        if (found := self._ones.get((rows, top_k))) is None:
            counted_T = self.counted(rows)
            one_T = torch.ones(rows, dtype=torch.int64, device=ids_TK.device) if counted_T is None else counted_T.long()
            self._ones[rows, top_k] = found = one_T[:, None].expand(-1, top_k).flatten()
        return found

    def number(self, rows: int) -> Tensor | int:
        """How many of these count; a tensor where the device alone knows it."""
        counted_T = self.counted(rows)
        return rows if counted_T is None else counted_T.sum()


_ALL = Tokens(None)


def tokens_of(model: PreTrainedModel) -> Tokens:
    """Those of the pass that a model is in, once `note_tokens` was called for it."""
    return adapter.recall(model, Tokens) or _ALL


def note_tokens(model: PreTrainedModel) -> None:
    """Has every forward of a model note its tokens, from now on."""
    if adapter.recall(model, Tokens) is not None:
        return
    adapter.remember(model, _ALL)
    names = list(inspect.signature(adapter.model_class(model).forward).parameters)[1:]
    model.register_forward_pre_hook(partial(_note, names), prepend=True, with_kwargs=True)


def _note(names: list[str], model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    counted_BS = _counted(call)
    layout = adapter.recall(model, ParallelLayout)
    if layout is not None and layout.tp > 1:
        counted_BS = _share(counted_BS, call, layout)
    adapter.remember(model, Tokens(counted_BS))


def _counted(call: Mapping[str, Any]) -> Tensor | None:
    """Bool ``[B, S]``."""
    piece, mask, ids, positions = (call.get(n) for n in (KEY, "attention_mask", "input_ids", "position_ids"))
    if isinstance(piece, SequencePiece) and piece.counted is not None:
        return piece.counted
    if isinstance(mask, Tensor) and mask.ndim == 2:
        length = _shape(call)[1]
        return mask[:, mask.shape[1] - length :].bool()  # without those in a cache
    if not isinstance(ids, Tensor) or not isinstance(positions, Tensor) or positions.shape[-2:] != ids.shape:
        return None
    if ids.shape[1] == 1:
        return None  # a token that is generated
    of_longer = isinstance(piece, SequencePiece) and piece.peers.rank > 0
    return ~adapter.filling(ids, positions if positions.ndim == 2 else positions[0], of_longer)


def _share(counted_BS: Tensor | None, call: Mapping[str, Any], layout: ParallelLayout) -> Tensor | None:
    """Of whole sequences, those tokens that this rank has between attentions, as `split_sequence` gives them."""
    batch, length = _shape(call)
    begin, share = piece_of(length, layout.tp, layout.place(dist.get_rank()).tp)
    padding = share * layout.tp - length
    if counted_BS is None:
        if padding == 0:
            return None
        device = next(value.device for value in call.values() if isinstance(value, Tensor))
        counted_BS = torch.ones(batch, length, dtype=torch.bool, device=device)
    return F.pad(counted_BS, (0, padding)).narrow(1, begin, share)


def _shape(call: Mapping[str, Any]) -> tuple[int, int]:
    ids = call.get("input_ids")
    tokens = call["inputs_embeds"] if ids is None else ids
    return tokens.shape[0], tokens.shape[1]
