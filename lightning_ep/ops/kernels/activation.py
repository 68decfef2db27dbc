"""SwiGLU times routing weight, forward and backward. Twins: `lightning_ep.ops.activation`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ep.ops.kernels.slots import slot_offset, with_unit_stride

_TILE = 2048  # elements of one half per program and step


@triton.jit
def _swiglu_kernel(
    h, weights, slots, out, P, stride,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < P
    mask = inside[:, None] & (col < WIDTH)[None, :]
    slot = tl.load(slots + row, mask=inside, other=0)
    weight = tl.load(weights + slot_offset(slot, stride, TOP_K), mask=inside, other=0.0).to(tl.float32)
    at = row[:, None] * (2 * WIDTH) + col[None, :]
    gate = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h + at + WIDTH, mask=mask, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * weight[:, None]
    tl.store(out + row[:, None] * WIDTH + col[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    h, weights, slots, grad, grad_h, out, grad_weights, P, stride,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < P
    slot = tl.load(slots + row, mask=inside, other=0)
    weight = tl.load(weights + slot_offset(slot, stride, TOP_K), mask=inside, other=0.0).to(tl.float32)[:, None]
    grad_weight = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (col < WIDTH)[None, :]
        at = row[:, None] * (2 * WIDTH) + col[None, :]
        half = row[:, None] * WIDTH + col[None, :]
        gate = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h + at + WIDTH, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + half, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        grad_weight += tl.sum(g * silu * up, axis=1)
        g *= weight
        tl.store(out + half, (silu * up * weight).to(out.dtype.element_ty), mask=mask)
        grad_gate = g * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(grad_h + at, grad_gate.to(grad_h.dtype.element_ty), mask=mask)
        tl.store(grad_h + at + WIDTH, (g * silu).to(grad_h.dtype.element_ty), mask=mask)
    tl.store(grad_weights + slot, grad_weight.to(grad_weights.dtype.element_ty), mask=inside)


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns per program: the largest power of two that divides the width, so that no lane idles."""
    block = min(width & -width, 1024)
    block = block if block >= 64 else min(triton.next_power_of_2(width), 1024)
    return max(_TILE // block, 1), block


def swiglu(h_PF: Tensor, weights_NK: Tensor, slot_P: Tensor) -> Tensor:
    """See `lightning_ep.ops.activation.swiglu`."""
    num_pairs, width = h_PF.shape[0], h_PF.shape[1] // 2
    out_PI = h_PF.new_empty(num_pairs, width)
    weights_NK = with_unit_stride(weights_NK)
    sizes = (weights_NK.stride(0), weights_NK.shape[1])
    rows, block = _tile(width)
    grid = (triton.cdiv(num_pairs, rows), triton.cdiv(width, block))
    _swiglu_kernel[grid](h_PF, weights_NK, slot_P, out_PI, num_pairs, *sizes, width, rows, block)
    return out_PI


def swiglu_backward(grad_PI: Tensor, h_PF: Tensor, weights_NK: Tensor, slot_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `lightning_ep.ops.activation.swiglu_backward`."""
    num_pairs, width = grad_PI.shape
    weights_NK = with_unit_stride(weights_NK)
    sizes = (weights_NK.stride(0), weights_NK.shape[1])
    grad_h_PF, out_PI = torch.empty_like(h_PF), torch.empty_like(grad_PI)
    grad_weights_NK = weights_NK.new_zeros(weights_NK.shape)
    rows, block = _tile(width)
    _swiglu_backward_kernel[(triton.cdiv(num_pairs, rows),)](
        h_PF, weights_NK, slot_P, grad_PI, grad_h_PF, out_PI, grad_weights_NK, num_pairs, *sizes, width, rows, block
    )
    return grad_h_PF, out_PI, grad_weights_NK
