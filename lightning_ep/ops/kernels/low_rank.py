"""Rows in expert order and the rank space of their expert's adapter, each read once. Twins: `ops.low_rank`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_ep.ops.kernels.launch import Kernel
from lightning_ep.ops.kernels.slots import with_unit_stride

_ROWS, _COLS, _DEPTH_BYTES = 64, 128, 256  # of a tile, whose stages in fp32 fit into the smallest chips that way
_LEAST, _RANKS = 16, 64  # ranks that tensor cores multiply at once, at least; that a tile has, at most
# Strides over ranks are constants: so the compiler sees that rows of 8 numbers can be copied ahead, 16 bytes at once.


@Kernel
def _project_kernel(
    x, factor, out, offsets, A, x_stride, factor_stride, scale,
    R: tl.constexpr, DEPTH_STRIDE: tl.constexpr, RANK_STRIDE: tl.constexpr,
    EXPERTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    # There are more programs than tiles: each finds the expert of its tile, which behind the last one is none.
    expert = tl.arange(0, BINS)
    ends = tl.load(offsets + expert, mask=expert < EXPERTS, other=0)
    counts = ends - tl.load(offsets + expert - 1, mask=(expert > 0) & (expert < EXPERTS), other=0)
    tiles = (counts + ROWS - 1) // ROWS
    before = tl.cumsum(tiles, axis=0) <= tl.program_id(0)
    e = tl.sum(before.to(tl.int32), axis=0)
    if e < EXPERTS:
        end = tl.sum(tl.where(expert <= e, counts, 0), axis=0)
        rows = tl.sum(tl.where(before, counts - tiles * ROWS, 0), axis=0) + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
        inside, used = rows < end, ranks < R
        x_rows = x + rows[:, None].to(tl.int64) * x_stride
        total = tl.zeros((ROWS, RANKS), tl.float32)
        for k in range(0, A, DEPTH):
            depth = k + tl.arange(0, DEPTH)
            x_tile = tl.load(x_rows + depth[None, :], mask=inside[:, None] & (depth < A)[None, :], other=0.0)
            at = e.to(tl.int64) * factor_stride + depth[:, None] * DEPTH_STRIDE + ranks[None, :] * RANK_STRIDE
            factor_tile = tl.load(factor + at, mask=(depth < A)[:, None] & used[None, :], other=0.0)
            total = tl.dot(x_tile, factor_tile, total, input_precision="ieee")
        result = (total * scale).to(out.dtype.element_ty)
        tl.store(out + rows[:, None].to(tl.int64) * R + ranks[None, :], result, mask=inside[:, None] & used[None, :])


def project(x_PA: Tensor, factor_EAR: Tensor, scale: float, offsets_E: Tensor) -> Tensor:
    """See `lightning_ep.ops.low_rank.project`."""
    num_rows, features = x_PA.shape
    num_experts, _, rank = factor_EAR.shape
    x_PA = with_unit_stride(x_PA)
    out_PR = x_PA.new_empty(num_rows, rank)
    ranks = _ranks(rank)
    grid = (triton.cdiv(num_rows, _ROWS) + num_experts, triton.cdiv(rank, ranks))  # each expert may cut one tile
    _project_kernel[grid](
        x_PA, factor_EAR, out_PR, offsets_E, features, x_PA.stride(0), factor_EAR.stride(0), scale,
        rank, *factor_EAR.stride()[1:], num_experts, triton.next_power_of_2(num_experts), _ROWS,
        _DEPTH_BYTES // x_PA.element_size(), ranks,
        num_warps=4,
        num_stages=4,
    )  # fmt: skip
    return out_PR


@Kernel
def _outer_kernel(
    x, low, index, out, offsets, A, x_stride, out_stride,
    R: tl.constexpr, LOW_STRIDE: tl.constexpr, COL_STRIDE: tl.constexpr, RANK_STRIDE: tl.constexpr,
    INDEXED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    in_row, used = cols < A, ranks < R
    start = tl.load(offsets + e - 1, mask=e > 0, other=0)
    end = tl.load(offsets + e)
    total = tl.zeros((COLS, RANKS), tl.float32)
    for first in range(start, end, ROWS):
        pairs = first + tl.arange(0, ROWS)
        inside = pairs < end
        rows = pairs
        if INDEXED:
            rows = tl.load(index + pairs, mask=inside, other=0)
        x_rows = x + rows[:, None].to(tl.int64) * x_stride
        x_tile = tl.load(x_rows + cols[None, :], mask=inside[:, None] & in_row[None, :], other=0.0)
        low_rows = low + pairs[:, None].to(tl.int64) * LOW_STRIDE
        low_tile = tl.load(low_rows + ranks[None, :], mask=inside[:, None] & used[None, :], other=0.0)
        total = tl.dot(tl.trans(x_tile), low_tile, total, input_precision="ieee")
    at = e.to(tl.int64) * out_stride + cols[:, None] * COL_STRIDE + ranks[None, :] * RANK_STRIDE
    tl.store(out + at, total.to(out.dtype.element_ty), mask=in_row[:, None] & used[None, :])


def outer_(out_EAR: Tensor, x_NA: Tensor, low_PR: Tensor, offsets_E: Tensor, row_P: Tensor | None = None) -> None:
    """See `lightning_ep.ops.low_rank.outer_`."""
    num_experts, features, rank = out_EAR.shape
    x_NA = with_unit_stride(x_NA)
    ranks = _ranks(rank)
    grid = (triton.cdiv(features, _COLS), num_experts, triton.cdiv(rank, ranks))
    _outer_kernel[grid](
        x_NA, low_PR, low_PR if row_P is None else row_P, out_EAR, offsets_E,
        features, x_NA.stride(0), out_EAR.stride(0), rank, low_PR.stride(0), *out_EAR.stride()[1:],
        row_P is not None, _ROWS, _COLS, ranks,
        num_warps=4,
        num_stages=4,
    )  # fmt: skip


def _ranks(rank: int) -> int:
    """Of a tile."""
    return min(max(triton.next_power_of_2(rank), _LEAST), _RANKS)
