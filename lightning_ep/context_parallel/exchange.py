"""Heads for tokens: before attention each rank gets all tokens of some heads, after it some tokens of all heads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_ep.distributed.progress import Progress


@dataclass(frozen=True)
class SequencePeers:
    """The ranks that share this rank's sequences.

    Attributes:
        group: Their process group; rank ``i`` of it holds the ``i``-th piece of every sequence.
        progress: Where this rank notes what it is waiting for.
    """

    group: dist.ProcessGroup
    progress: Progress = field(default_factory=Progress)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This rank's index."""
        return self.group.rank()

    def exchange(self, rows: Tensor, layer: str, hop: str) -> Tensor:
        """Sends ``rows[i]`` to rank ``i``; differentiable.

        Args:
            rows: ``[size, ...]``, contiguous.
            layer: Name of the layer, for messages.
            hop: What travels, for messages.

        Returns:
            The same shape: at ``i`` what rank ``i`` sent here.
        """
        return _Exchange.apply(rows, self, layer, hop)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, peers: SequencePeers, layer: str, hop: str) -> Tensor:
        ctx.peers, ctx.layer, ctx.hop = peers, layer, hop
        return _all_to_all(rows, peers, layer, f"{hop}, forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Equal splits make the exchange its own transpose.
        return _all_to_all(grad.contiguous(), ctx.peers, ctx.layer, f"{ctx.hop}, backward"), None, None, None


def _all_to_all(rows: Tensor, peers: SequencePeers, layer: str, hop: str) -> Tensor:
    received = torch.empty_like(rows)
    work = dist.all_to_all_single(received, rows, group=peers.group, async_op=True)
    exchange = peers.progress.started(layer, hop, work)
    with peers.progress.blocking(layer, hop):
        work.wait()
    exchange.waited(received.is_cuda)
    return received


def kv_repeats(kv_heads: int, size: int) -> int:
    """How often each KV head is repeated so that ``size`` ranks get equally many; 1 where ``size`` divides them.

    The least number that works. It divides the query heads per KV head wherever ``size`` divides the query heads, so
    every rank's query heads find their KV heads on the same rank, in order.
    """
    return size // math.gcd(size, kv_heads)


def gather_tokens(
    query_BHLD: Tensor, key_BHLD: Tensor, value_BHLD: Tensor, peers: SequencePeers, layer: str
) -> tuple[Tensor, Tensor, Tensor]:
    """From this rank's tokens of all heads to all tokens of this rank's heads, in one exchange (DeepSpeed-Ulysses).

    Args:
        query_BHLD: ``[B, heads, L, D]``, of which ``peers.size`` must divide the heads.
        key_BHLD: ``[B, kv_heads, L, D]``; heads are repeated where ``peers.size`` does not divide them.
        value_BHLD: ``[B, kv_heads, L, Dv]``.
        peers: The ranks that share the sequences.
        layer: Name of the layer, for messages.

    Returns:
        Query, key and value, ``[B, heads / size, L * size, D]`` each, as views of one tensor of tokens.
    """
    repeats = kv_repeats(key_BHLD.shape[1], peers.size)
    if repeats > 1:
        key_BHLD, value_BHLD = (x.repeat_interleave(repeats, dim=1) for x in (key_BHLD, value_BHLD))
    parts = [
        x.transpose(1, 2).unflatten(2, (peers.size, -1)).movedim(2, 0).flatten(3)  # [size, B, L, heads / size * D]
        for x in (query_BHLD, key_BHLD, value_BHLD)
    ]
    received = peers.exchange(torch.cat(parts, dim=3), layer, "exchange of queries, keys and values for heads")
    tokens_BSN = received.movedim(0, 1).flatten(1, 2)
    widths = [part.shape[3] for part in parts]
    query, key, value = (
        x_BSN.unflatten(2, (-1, dim)).transpose(1, 2)
        for x_BSN, dim in zip(
            tokens_BSN.split(widths, dim=2),
            (query_BHLD.shape[3], key_BHLD.shape[3], value_BHLD.shape[3]),
            strict=True,
        )
    )
    return query, key, value


def scatter_tokens(out_BSHD: Tensor, peers: SequencePeers, layer: str) -> Tensor:
    """The way back of `gather_tokens`: from all tokens of this rank's heads to this rank's tokens of all heads.

    Args:
        out_BSHD: Output of attention, ``[B, S, heads / size, Dv]``.
        peers: The ranks that share the sequences.
        layer: Name of the layer, for messages.

    Returns:
        ``[B, S / size, heads, Dv]``.
    """
    rows = out_BSHD.unflatten(1, (peers.size, -1)).movedim(1, 0).contiguous()
    received = peers.exchange(rows, layer, "exchange of attention's output for tokens")
    return received.movedim(0, 2).flatten(2, 3)
