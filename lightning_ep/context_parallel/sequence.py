"""A batch of whole sequences becomes this rank's piece of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_ep.context_parallel.documents import Documents, find_documents
from lightning_ep.context_parallel.exchange import SequencePeers
from lightning_ep.distributed.progress import Progress
from lightning_ep.ops.cross_entropy import IGNORE, shifted
from lightning_ep.ops.packed_attention import to_device
from lightning_ep.transformers_adapter import described

KEY = "sequence"
"""The argument with which a `SequencePiece` travels through a transformers model to its attention."""

NO_PIECE = (
    "The sequences of this model are split over the ranks of cp, but it was called without saying which piece this "
    "rank holds: each would attend to itself only. Pass all that `self.trainer.strategy.shard_sequence(batch)` returns "
    "to the model, as in `self.model(**self.trainer.strategy.shard_sequence(batch))`. To run whole sequences on every "
    "rank, as `generate` does, use `with lightning_ep.whole_sequences(model):`."
)
_TOKENS = ("input_ids", "inputs_embeds")
_PRECOMPUTED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_LABELS = ("labels", "shift_labels")  # padded with IGNORE


@dataclass(eq=False)  # not frozen: torch.compile would look into it and compile again for other values
class SequencePiece:
    """What attention must know of the whole sequences of which this rank holds a piece.

    It travels as an argument of the model, through ``**kwargs``, to the attention function: unlike a variable beside
    the call it is there when activation checkpointing replays a layer in backward (in another thread), and it cannot
    be that of an earlier batch.

    Attributes:
        peers: The ranks that share the sequences.
        batch: Number of sequences.
        length: Tokens of a whole sequence, padded to a multiple of the ranks.
        position_ids: ``[B, length]``, if the batch had some.
        attention_mask: ``[B, length]``, if the batch had one.
        documents: What the host knows of the two.
        bounds: ``documents.bounds`` on the device.
        counted: Bool ``[B, L]``, which tokens of the piece are no padding; None where nothing says that some are.
        masks: Masks that a layer has built, for the layers after it.
    """

    peers: SequencePeers
    batch: int
    length: int
    position_ids: Tensor | None
    attention_mask: Tensor | None
    documents: Documents
    bounds: Tensor | None
    counted: Tensor | None = None
    masks: dict[Any, Any] = field(default_factory=dict)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sums what each rank has of its pieces, such as the token losses of every sequence; no gradients."""
        values = values.detach().clone()
        dist.all_reduce(values, group=self.peers.group)
        return values


def shard_sequence(
    batch: Mapping[str, Any],
    mesh: DeviceMesh | None,
    documents: Documents | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """This rank's piece of a batch of whole sequences, as arguments for a transformers causal language model.

    ``model(**shard_sequence(batch, mesh)).loss`` is a loss whose mean over the ranks of the mesh is the loss of the
    whole batch. Of ``B`` sequences of ``S`` tokens, each of the ``cp`` ranks gets ``L = ceil(S / cp)`` consecutive
    ones; the last ranks' pieces are padded, and what is added counts in no token loss and no balancing loss of routers.

    What comes back, beside what the batch holds:

    - tensors of shape ``[B, S, ...]`` become ``[B, L, ...]``, padded with 0 (labels with -100);
    - ``position_ids`` ``[B, L]`` (``[1, L]`` if the batch has none), counted from the beginning of the whole sequence;
    - ``attention_mask`` ``[B, L]``, also where the batch has none and something was added;
    - ``shift_labels`` ``[B, L]``: the next label of every position, across the pieces' borders, if there are labels;
    - ``num_items_in_batch``: the number of targets of the whole batch over ``cp``, by which to divide summed losses;
    - ``sequence``: a `SequencePiece`, without which attention raises.

    If ``cp`` is 1, nothing is cut, and only ``shift_labels`` and ``num_items_in_batch`` are added.

    Args:
        batch: At least ``input_ids`` ``[B, S]`` or ``inputs_embeds`` ``[B, S, H]``. ``attention_mask`` is ``[B, S]``,
            and where ``position_ids`` restart inside a row a document begins.
        mesh: The ranks that share the batch (``Meshes.cp``), or None for one.
        documents: What `find_documents` gives for the batch. Default: it is asked, for which the host waits if the
            batch is on a GPU and has a mask or positions.
        progress: Where the ranks note what they wait for.

    Raises:
        TypeError: If ``batch`` is no mapping or has no tokens.
        ValueError: If it describes documents or masks in a form that cannot be split.
    """
    tokens = _tokens(batch)
    local = _with_targets(batch, 1 if mesh is None else mesh.size())
    if mesh is None:
        return local
    _refuse_other_descriptions(batch, tokens)
    peers = SequencePeers(mesh.get_group(), progress or Progress())
    rows, size = tokens.shape[:2]
    start, length = piece_of(size, peers.size, peers.rank)
    padding = peers.size * length - size
    positions, mask, labels = _whole(batch, rows, padding)
    documents = documents or find_documents(positions, mask, labels)
    shaped = {key: x for key, x in local.items() if isinstance(x, Tensor) and x.shape[:2] == (rows, size)}
    pieces = {key: _padded(x, padding, IGNORE if key in _LABELS else 0) for key, x in shaped.items()}
    if positions is not None:
        pieces["position_ids"] = positions
    pieces = {key: x.narrow(1, start, length).contiguous() for key, x in pieces.items()}
    if positions is None:
        pieces["position_ids"] = torch.arange(start, start + length, device=tokens.device)[None]
    counted = None
    if mask is not None or padding > 0:
        # Models leave padding out of their balancing loss by it, attention does not see it. A piece of nothing but
        # padding would divide by zero.
        added = torch.arange(start, start + length, device=tokens.device) >= size
        counted = pieces["attention_mask"].bool() if mask is not None else ~added.expand(rows, -1)
        pieces["attention_mask"] = counted | ~counted.any()
    if documents.by_positions:
        mask = None
    bounds = None if documents.bounds is None else to_device(documents.bounds, tokens.device)
    piece = SequencePiece(peers, rows, peers.size * length, positions, mask, documents, bounds, counted)
    return {**local, **pieces, KEY: piece}


def piece_of(size: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """Where a rank's piece of ``size`` tokens begins, and its length, that of every piece: the last ones are padded."""
    length = -(-size // num_ranks)
    return rank * length, length


def documents_of(batch: Any, cp: int) -> Documents | None:
    """What `shard_sequence` will want to know of the batch, asked while it is still in host memory; None if nothing."""
    if described(batch) == (None, None) or not any(key in batch for key in _TOKENS):
        return None
    tokens = _tokens(batch)
    _refuse_other_descriptions(batch, tokens)
    return find_documents(*_whole(batch, tokens.shape[0], -tokens.shape[1] % cp))


def _tokens(batch: Mapping[str, Any]) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(f"shard_sequence takes a dict of tensors, not {type(batch).__name__}.")
    tokens = [batch[key] for key in _TOKENS if key in batch]
    if not tokens:
        raise TypeError(f"the batch has none of {_TOKENS}, only {sorted(batch)}.")
    return tokens[0]


def _refuse_other_descriptions(batch: Mapping[str, Any], tokens: Tensor) -> None:
    rows, size = tokens.shape[:2]
    for key, allowed in (("attention_mask", [(rows, size)]), ("position_ids", [(rows, size), (1, size)])):
        if (value := batch.get(key)) is not None and tuple(value.shape) not in allowed:
            raise ValueError(
                f"{key} of shape {tuple(value.shape)} cannot be split over the ranks of cp; pass one of shape "
                f"{(rows, size)}. Packed documents are described by position_ids that restart at every document."
            )
    if found := [key for key in _PRECOMPUTED if key in batch]:
        raise ValueError(
            f"{found} describe whole sequences, which no rank holds under cp; pass position_ids that restart at every "
            "document instead."
        )


def _with_targets(batch: Mapping[str, Any], cp: int) -> dict[str, Any]:
    """The batch with ``shift_labels`` and ``num_items_in_batch``, if it has labels."""
    out = dict(batch)
    if out.get("labels") is not None:
        out.setdefault("shift_labels", shifted(out["labels"]))
    if "shift_labels" in out:
        num_items = out.get("num_items_in_batch")
        # Transformers divides the sum of a piece's losses by it; the mean over cp pieces divides once more.
        out["num_items_in_batch"] = ((out["shift_labels"] != IGNORE).sum() if num_items is None else num_items) / cp
    return out


def _whole(batch: Mapping[str, Any], rows: int, padding: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Positions, mask and labels of the padded sequences, ``[B, S]``; None where the batch has none."""
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if positions is not None:
        more = torch.arange(1, padding + 1, device=positions.device)
        positions = torch.cat([positions, positions[:, -1:] + more], dim=1).expand(rows, -1)
    labels = next((batch[key] for key in _LABELS if batch.get(key) is not None), None)
    return (
        positions,
        None if mask is None else _padded(mask, padding, 0),
        None if labels is None else _padded(labels, padding, IGNORE),
    )


def _padded(x: Tensor, padding: int, value: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding), value=value)
