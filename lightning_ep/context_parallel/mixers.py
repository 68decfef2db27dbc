"""Layers that need whole sequences beside attention: linear attention and short convolutions, on gathered tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.context_parallel.exchange import SequencePeers
from lightning_ep.context_parallel.sequence import KEY, NO_PIECE, SequencePiece

_PACKED = (
    "position_ids restart inside a row, as those of packed documents do, but {name} passes on a state from token to "
    "token: documents would see what came before them in the row. Give every document a row of its own (padded on the "
    "right)."
)


def gather_around_mixers(model: PreTrainedModel) -> None:
    """From now on every mixer of the model runs on whole sequences, which its ranks put together, and keeps its piece.

    Each rank computes what all do, and its outputs of other ranks' tokens go unused: a weight's gradients on the ranks
    are parts of one sum, as those of other layers are, and those of a token's hidden state come from all ranks.
    """
    for name, mixer in adapter.whole_sequence_mixers(model).items():
        mixer.forward = partial(_forward, model, mixer.forward, name)


# Its exchanges stay out of compiled graphs.
@torch.compiler.disable
def _forward(model: PreTrainedModel, whole: Any, name: str, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    piece = kwargs.pop(KEY, None)
    if not adapter.is_context_parallel(model):  # inside `whole_sequences`
        return whole(hidden_states=hidden_states, **kwargs)
    if not isinstance(piece, SequencePiece):
        raise RuntimeError(NO_PIECE)
    if piece.documents.by_positions:
        raise ValueError(_PACKED.format(name=name))
    # Padding of all tokens, and no cache: none could be gone on with.
    kwargs |= dict.fromkeys(adapter.STATE_NAMES & kwargs.keys()) | {"attention_mask": piece.attention_mask}
    length = hidden_states.shape[1]
    out_BSH = whole(hidden_states=gather_sequence(hidden_states, piece.peers, name), **kwargs)
    return out_BSH.narrow(1, piece.peers.rank * length, length)


def gather_sequence(x_BLH: Tensor, peers: SequencePeers, layer: str) -> Tensor:
    """Whole sequences from the pieces of all ranks: ``[B, L, H]`` -> ``[B, L * size, H]``.

    Backward sums what the ranks have of the gradient of each token, on the rank that it belongs to.

    Args:
        x_BLH: This rank's piece.
        peers: The ranks that share the sequences.
        layer: Name of the layer, for messages.
    """
    rows = x_BLH.unsqueeze(0).expand(peers.size, -1, -1, -1).contiguous()
    received = peers.exchange(rows, layer, "gathering of tokens for a mixer")
    return received.movedim(0, 1).flatten(1, 2)
