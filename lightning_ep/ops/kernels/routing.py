"""Routing metadata of an exchange in two launches. Twin: `lightning_ep.ops.routing`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _owners(ids, block, T, LOCAL: tl.constexpr, TOP_K: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of the block, the ids of their slots, and the ranks that hold them (-1 where there is no slot)."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, K)
    mask = (token < T)[:, None] & (k < TOP_K)[None, :]
    expert = tl.load(ids + token[:, None] * TOP_K + k[None, :], mask=mask, other=-1).to(tl.int32)
    return token, expert, tl.where(mask, expert // LOCAL, -1)


@triton.jit
def _count_kernel(
    ids, counts, T, num_blocks,
    LOCAL: tl.constexpr, TOP_K: tl.constexpr, RANKS: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    _, _, owner = _owners(ids, block, T, LOCAL, TOP_K, K, BLOCK)
    d = tl.arange(0, D)
    goes = (owner[:, :, None] == d[None, None, :]).to(tl.int32)
    rows = tl.sum(tl.max(goes, axis=1), axis=0)
    pairs = tl.sum(tl.sum(goes, axis=1), axis=0)
    tl.store(counts + d * num_blocks + block, rows, mask=d < RANKS)
    tl.store(counts + (RANKS + d) * num_blocks + block, pairs, mask=d < RANKS)


@triton.jit
def _route_kernel(
    ids, weights, counts, ends, row, first, slots, T, num_blocks,
    LOCAL: tl.constexpr, TOP_K: tl.constexpr, RANKS: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token, expert, owner = _owners(ids, block, T, LOCAL, TOP_K, K, BLOCK)
    d = tl.arange(0, D)
    k = tl.arange(0, K)
    goes = owner[:, :, None] == d[None, None, :]
    chosen = tl.max(goes.to(tl.int32), axis=1)
    cell = d * num_blocks + block
    start = tl.load(ends + cell, mask=d < RANKS, other=0) - tl.load(counts + cell, mask=d < RANKS, other=0)
    place = start[None, :] + tl.cumsum(chosen, axis=0) - chosen
    at = token[:, None] * TOP_K + k[None, :]
    inside = owner >= 0
    row_of_slot = tl.sum(tl.where(goes, place[:, None, :], 0), axis=2)
    repeats = (owner[:, None, :] == owner[:, :, None]) & (k[None, None, :] < k[None, :, None])
    repeated = tl.max(repeats.to(tl.int32), axis=2) > 0
    tl.store(row + at, row_of_slot.to(tl.int64), mask=inside)
    tl.store(first + at, tl.where(repeated, -1, row_of_slot), mask=inside)
    # The ids and weights that travel with each row: [tokens, slots, ranks].
    weight = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    to = place[:, None, :].to(tl.int64) * (2 * TOP_K) + k[None, :, None]
    travels = (chosen > 0)[:, None, :] & (k < TOP_K)[None, :, None]
    local = tl.where(goes, expert[:, :, None] - d[None, None, :] * LOCAL, LOCAL)
    bits = tl.broadcast_to(weight.to(tl.int32, bitcast=True)[:, :, None], (BLOCK, K, D))
    tl.store(slots + to, local, mask=travels)
    tl.store(slots + to + TOP_K, bits, mask=travels)


def destinations(
    ids_TK: Tensor, weights_TK: Tensor, num_local_experts: int, num_ranks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `lightning_ep.ops.routing.destinations`."""
    num_tokens, top_k = ids_TK.shape
    ids_TK, weights_TK = ids_TK.contiguous(), weights_TK.contiguous()
    slots_per_token, ranks = max(triton.next_power_of_2(top_k), 2), max(triton.next_power_of_2(num_ranks), 2)
    block = min(128, max(8192 // (slots_per_token * max(slots_per_token, ranks)), 1))
    num_blocks = max(triton.cdiv(num_tokens, block), 1)
    sizes = (num_local_experts, top_k, num_ranks, slots_per_token, ranks, block)
    counts = ids_TK.new_empty(2 * num_ranks, num_blocks, dtype=torch.int32)
    _count_kernel[(num_blocks,)](ids_TK, counts, num_tokens, num_blocks, *sizes)
    # Ranks first, then blocks of tokens: the running count is where each block's first row for each rank goes.
    ends = counts[:num_ranks].reshape(-1).cumsum(0, dtype=torch.int32)
    row_TK = torch.empty_like(ids_TK, dtype=torch.int64)
    first_TK = torch.empty_like(ids_TK, dtype=torch.int32)
    room = num_tokens * min(top_k, num_ranks)
    slots_S2K = ids_TK.new_empty(room, 2 * top_k, dtype=torch.int32)
    _route_kernel[(num_blocks,)](
        ids_TK, weights_TK, counts, ends, row_TK, first_TK, slots_S2K, num_tokens, num_blocks, *sizes
    )
    counts_D2 = counts.view(2, num_ranks, num_blocks).sum(2).t().contiguous()
    return row_TK, first_TK, slots_S2K, counts_D2
