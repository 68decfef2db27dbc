"""Rows in expert order to the rank space of their expert's adapter and back, in one pass. Twins: `ops.low_rank`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLS, _DEPTH, _RANKS = 64, 256, 128, 64  # of a tile, at most


def _tile_of_ranks(rank: int) -> int:
    return min(_RANKS, max(16, triton.next_power_of_2(rank)))  # tensor cores multiply 16 at once, at least


@triton.jit
def _tile_of_rows(offsets, EXPERTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr):
    """The expert of this program's tile of rows, and where the tile begins and the expert's rows end.

    There are more programs than tiles: behind the last one the expert is ``BINS``.
    """
    expert = tl.arange(0, BINS)
    ends = tl.load(offsets + expert, mask=expert < EXPERTS, other=0)
    counts = ends - tl.load(offsets + expert - 1, mask=(expert > 0) & (expert < EXPERTS), other=0)
    tiles = (counts + ROWS - 1) // ROWS
    before = tl.cumsum(tiles, axis=0) <= tl.program_id(0)
    e = tl.sum(before.to(tl.int32), axis=0)
    start = tl.sum(tl.where(before, counts - tiles * ROWS, 0), axis=0) + tl.program_id(0) * ROWS
    return e, start, tl.sum(tl.where(expert <= e, counts, 0), axis=0)


@triton.jit
def _project_kernel(
    x, factor, out, offsets, A, R, WIDTH, factor_stride, depth_stride, rank_stride, scale,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    e, start, end = _tile_of_rows(offsets, EXPERTS, BINS, ROWS)
    if e < EXPERTS:
        rows, ranks = start + tl.arange(0, ROWS), tl.program_id(1) * RANKS + tl.arange(0, RANKS)
        total = tl.zeros((ROWS, RANKS), tl.float32)
        for k in range(0, A, DEPTH):
            depth = k + tl.arange(0, DEPTH)
            mask = (rows < end)[:, None] & (depth < A)[None, :]
            x_tile = tl.load(x + rows[:, None].to(tl.int64) * A + depth[None, :], mask=mask, other=0.0)
            places = e.to(tl.int64) * factor_stride + depth[:, None] * depth_stride + ranks[None, :] * rank_stride
            y_tile = tl.load(factor + places, mask=(depth < A)[:, None] & (ranks < R)[None, :], other=0.0)
            total = tl.dot(x_tile, y_tile, total, input_precision="ieee")
        result = (total * scale).to(out.dtype.element_ty)
        place = out + rows[:, None].to(tl.int64) * WIDTH + ranks[None, :]
        tl.store(place, result, mask=(rows < end)[:, None] & (ranks < WIDTH)[None, :])


def project(x_PA: Tensor, factor_EAR: Tensor, scale: float, offsets_E: Tensor, width: int) -> Tensor:
    """See `lightning_ep.ops.low_rank.project`; rows get ``width`` numbers."""
    num_rows, features = x_PA.shape
    num_experts, _, rank = factor_EAR.shape
    out_PR = x_PA.new_empty(num_rows, width)
    grid = (triton.cdiv(num_rows, _ROWS) + num_experts, triton.cdiv(width, _RANKS))  # each expert may cut one tile
    _project_kernel[grid](
        x_PA, factor_EAR, out_PR, offsets_E, features, rank, width, *factor_EAR.stride(), scale,
        num_experts, triton.next_power_of_2(num_experts), _ROWS, _DEPTH, _tile_of_ranks(rank),
        num_warps=4,
        num_stages=3,
    )  # fmt: skip
    return out_PR


@triton.jit
def _add_product_kernel(
    out, low, factor, offsets, B, R, WIDTH, factor_stride, rank_stride, col_stride,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    e, start, end = _tile_of_rows(offsets, EXPERTS, BINS, ROWS)
    if e < EXPERTS:
        rows, cols = start + tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
        mask = (rows < end)[:, None] & (cols < B)[None, :]
        place = out + rows[:, None].to(tl.int64) * B + cols[None, :]
        total = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        for first in range(0, R, RANKS):
            ranks = first + tl.arange(0, RANKS)
            of_rows = rows[:, None].to(tl.int64) * WIDTH + ranks[None, :]
            x = tl.load(low + of_rows, mask=(rows < end)[:, None] & (ranks < R)[None, :], other=0.0)
            places = e.to(tl.int64) * factor_stride + ranks[:, None] * rank_stride + cols[None, :] * col_stride
            y = tl.load(factor + places, mask=(ranks < R)[:, None] & (cols < B)[None, :], other=0.0)
            total = tl.dot(x, y, total, input_precision="ieee")
        tl.store(place, total.to(out.dtype.element_ty), mask=mask)


def add_product_(out_PB: Tensor, low_PR: Tensor, factor_ERB: Tensor, offsets_E: Tensor) -> None:
    """See `lightning_ep.ops.low_rank.add_product_`."""
    num_rows, width = out_PB.shape
    num_experts, rank, _ = factor_ERB.shape
    grid = (triton.cdiv(num_rows, _ROWS) + num_experts, triton.cdiv(width, _COLS))
    _add_product_kernel[grid](
        out_PB, low_PR, factor_ERB, offsets_E, width, rank, low_PR.shape[1], *factor_ERB.stride(),
        num_experts, triton.next_power_of_2(num_experts), _ROWS, _COLS, _tile_of_ranks(rank),
        num_warps=8,
    )  # fmt: skip
