"""Moving rows between token order and expert order. Twins: `lightning_ep.ops.permute`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 4  # rows per program: enough loads in flight to hide their latency


@triton.jit
def _permute_kernel(rows, places, out, N, H, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < H
    for r in tl.static_range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + r
        if row < N:
            # Each row is read once and written to all its places: a gather would read it once per place.
            x = tl.load(rows + row * H + cols, mask=in_row)
            for k in tl.static_range(TOP_K):
                place = tl.load(places + row * TOP_K + k).to(tl.int64)
                tl.store(out + place * H + cols, x, mask=in_row & (place >= 0))


def permute(rows_NH: Tensor, place_NK: Tensor, num_places: int) -> Tensor:
    """See `lightning_ep.ops.permute.permute`."""
    num_rows, hidden = rows_NH.shape
    out_PH = rows_NH.new_empty(num_places, hidden)
    if num_places == 0:
        return out_PH
    rows_NH, place_NK = rows_NH.contiguous(), place_NK.contiguous()
    block = min(triton.next_power_of_2(hidden), 4096)
    grid = (triton.cdiv(num_rows, _ROWS), triton.cdiv(hidden, block))
    _permute_kernel[grid](rows_NH, place_NK, out_PH, num_rows, hidden, place_NK.shape[1], _ROWS, block)
    return out_PH


@triton.jit
def _gather_sum_kernel(rows, index, out, T, H, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < H
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.load(index + row * TOP_K + k).to(tl.int64)
        total += tl.load(rows + place * H + cols, mask=in_row & (place >= 0), other=0.0).to(tl.float32)
    tl.store(out + row * H + cols, total.to(out.dtype.element_ty), mask=in_row)


def gather_sum(rows_NH: Tensor, index_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """See `lightning_ep.ops.permute.gather_sum`."""
    num_out, top_k = index_TK.shape
    hidden = rows_NH.shape[1]
    out_TH = rows_NH.new_empty(num_out, hidden, dtype=dtype)
    if num_out == 0:
        return out_TH
    block = min(triton.next_power_of_2(hidden), 2048)
    grid = (num_out, triton.cdiv(hidden, block))
    _gather_sum_kernel[grid](rows_NH.contiguous(), index_TK.contiguous(), out_TH, num_out, hidden, top_k, block)
    return out_TH


@triton.jit
def _count_kernel(ids, counts, num_slots, NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + slot, mask=slot < num_slots, other=NUM_EXPERTS).to(tl.int32)
    histogram = tl.histogram(expert, BINS)
    bins = tl.arange(0, BINS)
    tl.store(counts + bins * tl.num_programs(0) + tl.program_id(0), histogram, mask=bins < NUM_EXPERTS)


@triton.jit
def _place_kernel(ids, ends, counts, pair, slots, num_slots, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    local = tl.arange(0, BLOCK)
    slot = tl.program_id(0) * BLOCK + local
    inside = slot < num_slots
    expert = tl.load(ids + slot, mask=inside, other=NUM_EXPERTS).to(tl.int32)
    earlier = (expert[None, :] == expert[:, None]) & (local[None, :] < local[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    kept = expert < NUM_EXPERTS
    cell = expert * tl.num_programs(0) + tl.program_id(0)
    start = tl.load(ends + cell, mask=kept, other=0) - tl.load(counts + cell, mask=kept, other=0)
    place = tl.where(kept, start + rank, -1)
    tl.store(pair + slot, place, mask=inside)
    tl.store(slots + place, slot, mask=kept)


def expert_order(ids_NK: Tensor, num_experts: int, num_pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `lightning_ep.ops.permute.expert_order`: a stable counting sort, two launches around one cumulative sum."""
    ids = ids_NK.reshape(-1)
    block = 128
    num_blocks = max(triton.cdiv(ids.numel(), block), 1)
    counts_EB = ids.new_empty(num_experts, num_blocks, dtype=torch.int32)
    bins = triton.next_power_of_2(num_experts + 1)
    _count_kernel[(num_blocks,)](ids, counts_EB, ids.numel(), num_experts, bins, block)
    # Experts first, then blocks: the running count is where each block's first pair of each expert goes.
    ends_EB = counts_EB.view(-1).cumsum(0, dtype=torch.int32).view(num_experts, num_blocks)
    pair_NK = torch.empty_like(ids_NK, dtype=torch.int32)
    slot_P = ids.new_empty(num_pairs, dtype=torch.int32)
    _place_kernel[(num_blocks,)](ids, ends_EB, counts_EB, pair_NK, slot_P, ids.numel(), num_experts, block)
    return slot_P, pair_NK, ends_EB[:, -1].contiguous()
