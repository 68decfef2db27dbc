"""Routing metadata of an exchange in two launches. Twin: `lightning_ep.ops.routing`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ep.ops.kernels.launch import Kernel

_SCANNED = 2**15  # counts, from which on they are summed beforehand


@triton.jit
def _owners(ids, block, T, LOCAL: tl.constexpr, TOP_K: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of the block, the ids of their slots, and the ranks that hold them (-1 where there is no slot)."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, K)
    mask = (token < T)[:, None] & (k < TOP_K)[None, :]
    expert = tl.load(ids + token[:, None] * TOP_K + k[None, :], mask=mask, other=-1).to(tl.int32)
    return token, expert, tl.where(mask, expert // LOCAL, -1)


@Kernel
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


@Kernel
def _route_kernel(
    ids, weights, counts, ends, row, first, slots, totals, T, num_blocks, stride,
    LOCAL: tl.constexpr, TOP_K: tl.constexpr, RANKS: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SCANNED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token, expert, owner = _owners(ids, block, T, LOCAL, TOP_K, K, BLOCK)
    d = tl.arange(0, D)
    k = tl.arange(0, K)
    goes = owner[:, :, None] == d[None, None, :]
    chosen = tl.max(goes.to(tl.int32), axis=1)
    # Ranks first, then blocks of tokens: where this block's first row for each rank goes.
    rows = tl.zeros((D,), tl.int32)
    pairs = tl.zeros((D,), tl.int32)
    start = tl.zeros((D,), tl.int32)
    limit = num_blocks
    if SCANNED:
        limit = tl.where(block == 0, num_blocks, 0)  # for the totals
    for first_block in range(0, limit, CHUNK):
        other = first_block + tl.arange(0, CHUNK)
        mask = (d < RANKS)[:, None] & (other < num_blocks)[None, :]
        cell = d[:, None] * num_blocks + other[None, :]
        count = tl.load(counts + cell, mask=mask, other=0)
        rows += tl.sum(count, axis=1)
        start += tl.sum(tl.where(other[None, :] < block, count, 0), axis=1)
        if block == 0:
            pairs += tl.sum(tl.load(counts + RANKS * num_blocks + cell, mask=mask, other=0), axis=1)
    start += tl.cumsum(rows, axis=0) - rows
    if SCANNED:
        cell_of_block = d * num_blocks + block
        start = tl.load(ends + cell_of_block, mask=d < RANKS, other=0)
        start -= tl.load(counts + cell_of_block, mask=d < RANKS, other=0)
    if block == 0:
        tl.store(totals + 2 * d, rows.to(tl.int64), mask=d < RANKS)
        tl.store(totals + 2 * d + 1, pairs.to(tl.int64), mask=d < RANKS)
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
    to = place[:, None, :].to(tl.int64) * stride + k[None, :, None]
    travels = (chosen > 0)[:, None, :] & (k < TOP_K)[None, :, None]
    local = tl.where(goes, expert[:, :, None] - d[None, None, :] * LOCAL, LOCAL)
    bits = tl.broadcast_to(weight.to(tl.int32, bitcast=True)[:, :, None], (BLOCK, K, D))
    tl.store(slots + to, local, mask=travels)
    tl.store(slots + to + TOP_K, bits, mask=travels)


def destinations(
    ids_TK: Tensor, weights_TK: Tensor, num_local_experts: int, num_ranks: int, slots_S2K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `lightning_ep.ops.routing.destinations`."""
    num_tokens, top_k = ids_TK.shape
    ids_TK, weights_TK = ids_TK.contiguous(), weights_TK.contiguous()
    slots_per_token, ranks = max(triton.next_power_of_2(top_k), 2), max(triton.next_power_of_2(num_ranks), 2)
    block = min(128, max(8192 // (slots_per_token * max(slots_per_token, ranks)), 1))
    num_blocks = max(triton.cdiv(num_tokens, block), 1)
    sizes = (num_local_experts, top_k, num_ranks, slots_per_token, ranks, block)
    counts = ids_TK.new_empty(2 * num_ranks, num_blocks, dtype=torch.int32)
    _count_kernel[(num_blocks,)](ids_TK, counts, num_tokens, num_blocks, *sizes)
    row_TK = torch.empty_like(ids_TK, dtype=torch.int64)
    first_TK = torch.empty_like(ids_TK, dtype=torch.int32)
    # Every block adds up what the others have counted, for many of them less quickly than a sum made once.
    scanned = num_blocks * num_ranks > _SCANNED
    ends = counts[:num_ranks].reshape(-1).cumsum(0, dtype=torch.int32) if scanned else counts
    counts_2D2 = ids_TK.new_empty(2, num_ranks, 2, dtype=torch.int64)
    _route_kernel[(num_blocks,)](
        ids_TK, weights_TK, counts, ends, row_TK, first_TK, slots_S2K, counts_2D2, num_tokens, num_blocks,
        slots_S2K.stride(0), *sizes, max(2048 // ranks, 1), scanned,
    )  # fmt: skip
    return row_TK, first_TK, counts_2D2
