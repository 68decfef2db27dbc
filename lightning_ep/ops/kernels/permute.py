"""Moving rows between token order and expert order. Twins: `lightning_ep.ops.permute`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ep.ops.kernels.launch import Kernel
from lightning_ep.ops.kernels.slots import slot_offset, with_unit_stride


@Kernel
def _permute_kernel(rows, places, out, H, stride, out_stride, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < H
    # Each row is read once and written to all its places: a gather would read it once per place.
    x = tl.load(rows + row * stride + cols, mask=in_row)
    for k in tl.static_range(TOP_K):
        place = tl.load(places + row * TOP_K + k).to(tl.int64)
        tl.store(out + place * out_stride + cols, x, mask=in_row & (place >= 0))


def permute(rows_NH: Tensor, place_NK: Tensor, num_places: int, out_PH: Tensor | None = None) -> Tensor:
    """See `lightning_ep.ops.permute.permute`."""
    num_rows, hidden = rows_NH.shape
    out_PH = rows_NH.new_empty(num_places, hidden) if out_PH is None else out_PH
    if num_places == 0 or num_rows == 0:
        return out_PH
    rows_NH, place_NK = with_unit_stride(rows_NH), place_NK.contiguous()
    block = min(triton.next_power_of_2(hidden), 4096)
    grid = (num_rows, triton.cdiv(hidden, block))
    strides = (rows_NH.stride(0), out_PH.stride(0))
    _permute_kernel[grid](rows_NH, place_NK, out_PH, hidden, *strides, place_NK.shape[1], block, num_warps=8)
    return out_PH


@Kernel
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
    block = min(triton.next_power_of_2(hidden), 1024)
    grid = (num_out, triton.cdiv(hidden, block))
    _gather_sum_kernel[grid](rows_NH.contiguous(), index_TK.contiguous(), out_TH, num_out, hidden, top_k, block)
    return out_TH


@triton.jit
def _experts(ids, slot, num_slots, stride, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr):
    """Which expert each slot names; none past the last slot."""
    return tl.load(ids + slot_offset(slot, stride, TOP_K), mask=slot < num_slots, other=NUM_EXPERTS).to(tl.int32)


@Kernel
def _count_kernel(
    ids, counts, num_slots, stride,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = _experts(ids, slot, num_slots, stride, NUM_EXPERTS, TOP_K)
    histogram = tl.histogram(expert, BINS)
    bins = tl.arange(0, BINS)
    tl.store(counts + bins * tl.num_programs(0) + tl.program_id(0), histogram, mask=bins < NUM_EXPERTS)


@Kernel
def _place_kernel(
    ids, ends, counts, pair, slots, offsets, num_slots, stride,
    NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    local = tl.arange(0, BLOCK)
    slot = tl.program_id(0) * BLOCK + local
    inside = slot < num_slots
    expert = _experts(ids, slot, num_slots, stride, NUM_EXPERTS, TOP_K)
    earlier = (expert[None, :] == expert[:, None]) & (local[None, :] < local[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    kept = expert < NUM_EXPERTS
    cell = expert * tl.num_programs(0) + tl.program_id(0)
    start = tl.load(ends + cell, mask=kept, other=0) - tl.load(counts + cell, mask=kept, other=0)
    place = tl.where(kept, start + rank, -1)
    tl.store(pair + slot, place, mask=inside)
    tl.store(slots + place, slot, mask=kept)
    if tl.program_id(0) == 0:
        bins = tl.arange(0, BINS)
        last = tl.load(ends + (bins + 1) * tl.num_programs(0) - 1, mask=bins < NUM_EXPERTS)
        tl.store(offsets + bins, last, mask=bins < NUM_EXPERTS)


def expert_order(ids_NK: Tensor, num_experts: int, num_pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `lightning_ep.ops.permute.expert_order`: a stable counting sort, two launches around one cumulative sum."""
    ids_NK = with_unit_stride(ids_NK)
    num_slots, top_k = ids_NK.numel(), ids_NK.shape[1]
    block = 128
    num_blocks = max(triton.cdiv(num_slots, block), 1)
    counts = ids_NK.new_empty(num_experts * num_blocks, dtype=torch.int32)
    sizes = (num_slots, ids_NK.stride(0), num_experts, top_k, triton.next_power_of_2(num_experts + 1), block)
    _count_kernel[(num_blocks,)](ids_NK, counts, *sizes)
    # Experts first, then blocks: the running count is where each block's first pair of each expert goes.
    ends = counts.cumsum(0, dtype=torch.int32)
    pair_NK = ids_NK.new_empty(ids_NK.shape, dtype=torch.int32)
    slot_P = ids_NK.new_empty(num_pairs, dtype=torch.int32)
    offsets_E = ids_NK.new_empty(num_experts, dtype=torch.int32)
    _place_kernel[(num_blocks,)](ids_NK, ends, counts, pair_NK, slot_P, offsets_E, *sizes)
    return slot_P, pair_NK, offsets_E
