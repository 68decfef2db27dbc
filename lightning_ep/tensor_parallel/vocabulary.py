"""Embedding, head and loss of which every tensor-parallel rank holds a share of the vocabulary."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ParallelStyle
from typing_extensions import override

from lightning_ep.ops.cross_entropy import VocabularyShard, linear_cross_entropy
from lightning_ep.tensor_parallel.collectives import (
    TensorGroup,
    all_reduce,
    gather_features,
    gather_rows,
    sum_gradients,
)
from lightning_ep.tensor_parallel.parameters import distribute, local, specialize


class _VocabularyEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        group: TensorGroup = self.tensor_group  # type: ignore[assignment]
        weight_VH: Tensor = local(self.weight)
        share = weight_VH.shape[0]
        start = group.rank * share
        # Ids that no rank has stay out of range, for the error that one device would raise.
        elsewhere = (ids >= 0) & (ids < share * group.size) & ((ids < start) | (ids >= start + share))
        padding = self.padding_idx
        own_padding = padding - start if padding is not None and start <= padding < start + share else None
        rows = F.embedding((ids - start).masked_fill(elsewhere, 0), weight_VH, own_padding)
        return all_reduce(rows.masked_fill(elsewhere.unsqueeze(-1), 0), group)


class _VocabularyHead(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        # All logits on every rank: what a model does with them (its own loss, sampling) takes them whole.
        return gather_features(F.linear(hidden, local(self.weight), local(self.bias)), self.tensor_group)  # type: ignore[arg-type]


class VocabularyEmbedding(ParallelStyle):
    """An `nn.Embedding` whose rows are split; every rank looks up its own, and the sum is what all of them get."""

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, "weight", device_mesh, Shard(0))
        specialize(module, _VocabularyEmbedding, TensorGroup.of(device_mesh))
        return module


class VocabularyHead(ParallelStyle):
    """An `nn.Linear` of which every rank computes a share of the logits, and gets all.

    Args:
        embedding: The embedding whose weight it shares, if it does.
    """

    def __init__(self, embedding: nn.Module | None) -> None:
        super().__init__()
        self.embedding = embedding

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self.embedding is not None:
            module._parameters["weight"] = self.embedding._parameters["weight"]  # one object for tied parameters
        else:
            distribute(module, "weight", device_mesh, Shard(0))
        distribute(module, "bias", device_mesh, Shard(0))
        specialize(module, _VocabularyHead, TensorGroup.of(device_mesh))
        return module


def is_plain_head(head: nn.Module | None) -> bool:
    """Whether ``head`` is a linear layer without bias that does nothing else, its vocabulary split or not."""
    forwards = (nn.Linear.forward, _VocabularyHead.forward)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    return type(head).forward in forwards and "forward" not in vars(head)


def head_cross_entropy(
    head: nn.Linear, hidden_TH: Tensor, targets_T: Tensor, ignore_index: int, per_token: bool = False
) -> Tensor:
    """`linear_cross_entropy` with the head's weight, its vocabulary split or not.

    Args:
        head: A head that `is_plain_head`.
        hidden_TH: ``[T, H]``, the same on all ranks; computed with in the dtype of the head.
        targets_T: int64 ``[T]``, the same on all ranks.
        ignore_index: As in `linear_cross_entropy`.
        per_token: As there.

    Returns:
        0-dim fp32 tensor, or ``[T]``, the same on all ranks. The gradient of ``hidden_TH`` is this rank's part of the
        sum.
    """
    group: TensorGroup | None = getattr(head, "tensor_group", None)
    hidden_TH = hidden_TH.to(head.weight.dtype)
    if group is None:
        return linear_cross_entropy(hidden_TH, head.weight, targets_T, ignore_index, per_token=per_token)
    weight_VH: Tensor = local(head.weight)
    shard = VocabularyShard(group.rank * weight_VH.shape[0], partial(_stack, group=group))
    loss = linear_cross_entropy(hidden_TH, weight_VH, targets_T, ignore_index, shard, per_token)
    return sum_gradients(loss, group)


@torch.no_grad()
def _stack(x: Tensor, group: TensorGroup) -> Tensor:
    return gather_rows(x.unsqueeze(0), group)
