"""Gradients of an input embedding, sent as those of its tokens.

FSDP reduces what autograd makes of a lookup: a gradient of the whole vocabulary, zero in nearly every row. Of
Qwen3-30B-A3B that is 1.2 GB in fp32, which are filled, cast, copied and sent where every backward ends, with nothing
left to hide it. Here ranks send the gradients of their tokens, and each adds up those of its part of the vocabulary, in
fp32: 67 MB per rank of 16,384 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_ep.distributed.gathers import gather_single
from lightning_ep.distributed.host_copies import OnHost
from lightning_ep.distributed.shards import as_gradient_of, local_region
from lightning_ep.fsdp import state as fsdp


def has_plain_lookup(embedding: nn.Module) -> bool:
    """Whether an embedding is torch's own, with nothing but a row for every token, and gradients of its own kind."""
    own = isinstance(embedding, nn.Embedding) and "forward" not in vars(embedding)
    plain = own and type(embedding).forward is nn.Embedding.forward
    return plain and embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse


class TokenGradients:
    """Has the gradients of one embedding travel as those of its tokens, where that is less than FSDP would send.

    They arrive in ``.grad`` with every backward, in the middle of an accumulation window, too. What else reads the
    gathered weight gets its gradient by FSDP, and both add up. In fp32 only: in bf16 every backward of a window would
    round, and FSDP's sums do not.

    Args:
        embedding: One that `has_plain_lookup`, to which `fully_shard` was applied over ``mesh``. All ranks must call it
            equally often with gradients, and their backwards must come to these calls in one order.
        mesh: The ranks that share its rows, with copies of the model in front.
    """

    def __init__(self, embedding: nn.Embedding, mesh: DeviceMesh) -> None:
        self._embedding = embedding
        self._groups: Sequence[Any] = [group for group in mesh.get_all_groups() if group.size() > 1]
        self._num_ranks = mesh.size()
        embedding.forward = self._look_up  # type: ignore[method-assign]

    def _look_up(self, input: Tensor) -> Tensor:
        weight, padding = self._embedding.weight, self._embedding.padding_idx
        (param,) = fsdp.parameters(fsdp.group_of(self._embedding))
        shard = fsdp.shard_of(param)
        if not torch.is_grad_enabled() or not shard.requires_grad or shard.dtype.itemsize < 4:
            return F.embedding(input, weight, padding)
        counts = None
        if self._num_ranks > 1:  # for backward: here the host would wait for it
            counts = OnHost(self._of_all(torch.full((1,), input.numel(), device=input.device)))
        return _LookUp.apply(self, counts, input, weight, shard)

    def gradients(
        self, counts: OnHost | None, ids_T: Tensor, grad_TH: Tensor, shard: DTensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of the gathered weight, which FSDP reduces, or that of this rank's shard; the other is None.

        Args:
            counts: ``[ranks]``, how many tokens every rank has; None for one rank. They alone decide, so that a resumed
                run adds up in the same order.
            ids_T: This rank's.
            grad_TH: Of what was looked up.
            shard: This rank's part of the weight.
        """
        rows, padding = self._embedding.num_embeddings, self._embedding.padding_idx
        if counts is not None:
            most = int(counts.wait().max())
            if self._num_ranks * most * grad_TH.dtype.itemsize > rows * torch.float32.itemsize:
                padding = -1 if padding is None else padding
                return torch.ops.aten.embedding_dense_backward(grad_TH, ids_T, rows, padding, False), None
            missing = most - ids_T.shape[0]
            ids_T = self._of_all(F.pad(ids_T, (0, missing), value=-1)).flatten()
            grad_TH = self._of_all(F.pad(grad_TH, (0, 0, 0, missing))).flatten(0, 1)
        if padding is not None:
            ids_T = ids_T.masked_fill(ids_T == padding, -1)
        here = local_region(shard)
        first, own = here.start[0], here.size[0]
        ids_T = ids_T - first
        ids_T = torch.where((ids_T >= 0) & (ids_T < own), ids_T, own)  # a row behind the last one, which is left out
        grad_TH = grad_TH.to(torch.promote_types(grad_TH.dtype, torch.float32))
        sums = torch.ops.aten.embedding_dense_backward(grad_TH, ids_T, own + 1, own, False)[:own]
        return None, as_gradient_of(sums.to(shard.dtype), shard)

    def _of_all(self, tensor: Tensor) -> Tensor:
        """Every rank's ``[...]``, stacked in the order of ranks."""
        tensor = tensor.unsqueeze(0).contiguous()
        for group in reversed(self._groups):
            stacked = tensor.new_empty(group.size() * tensor.shape[0], *tensor.shape[1:])
            gather_single(stacked, tensor, group=group)
            tensor = stacked
        return tensor


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, owner: TokenGradients, counts: OnHost | None, ids: Tensor, weight_VH: Tensor, shard: DTensor
    ) -> Tensor:
        ctx.owner, ctx.counts, ctx.shard = owner, counts, shard
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        grad_TH = grad.reshape(-1, grad.shape[-1])  # also of one id, `[]`
        of_weight, of_shard = ctx.owner.gradients(ctx.counts, ids.flatten(), grad_TH, ctx.shard)
        return None, None, None, of_weight, of_shard
