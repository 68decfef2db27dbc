"""Activations times routing weight, forward and backward. Twins: `lightning_ep.ops.activation`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_ep.ops.expert_form import CUBIC, TWICE_ROOT, Activation, ExpertBias
from lightning_ep.ops.kernels.launch import Kernel
from lightning_ep.ops.kernels.slots import slot_offset, with_unit_stride

_TILE = 2048  # elements of one half per program and step
_CUBIC, _TWICE_ROOT = tl.constexpr(CUBIC), tl.constexpr(TWICE_ROOT)


@triton.jit
def _read(
    matrix, row, start, inside,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gate and up of a tile of rows in fp32; the same twice where nothing is gated."""
    if INTERLEAVED:  # read as they lie, then told apart: a load of every second number would waste half of it
        col = 2 * start + tl.arange(0, 2 * BLOCK)
        mask = inside[:, None] & (col < 2 * WIDTH)[None, :]
        both = tl.load(matrix + row[:, None] * (2 * WIDTH) + col[None, :], mask=mask, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
    else:
        col = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (col < WIDTH)[None, :]
        at = row[:, None] * (2 * WIDTH if GATED else WIDTH) + col[None, :]
        gate = tl.load(matrix + at, mask=mask, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(matrix + at + WIDTH, mask=mask, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _write(
    matrix, row, start, inside, gate, up,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The reverse of `_read`."""
    dtype = matrix.dtype.element_ty
    if INTERLEAVED:
        col = 2 * start + tl.arange(0, 2 * BLOCK)
        mask = inside[:, None] & (col < 2 * WIDTH)[None, :]
        both = tl.reshape(tl.join(gate, up), (ROWS, 2 * BLOCK))
        tl.store(matrix + row[:, None] * (2 * WIDTH) + col[None, :], both.to(dtype), mask=mask)
    else:
        col = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (col < WIDTH)[None, :]
        at = row[:, None] * (2 * WIDTH if GATED else WIDTH) + col[None, :]
        tl.store(matrix + at, gate.to(dtype), mask=mask)
        if GATED:
            tl.store(matrix + at + WIDTH, up.to(dtype), mask=mask)


@triton.jit
def _experts(ids, slot, inside, stride, TOP_K: tl.constexpr):
    """The expert of each pair, whose bias it takes."""
    return tl.load(ids + slot_offset(slot, stride, TOP_K), mask=inside, other=0).to(tl.int64)


@triton.jit
def _clamp(gate, up, LIMIT: tl.constexpr):
    # By comparison, since `minimum` would make a number of a NaN.
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate, up


@triton.jit
def _function(x, FUNCTION: tl.constexpr, ALPHA: tl.constexpr):
    """The value, and its derivative."""
    if FUNCTION == "relu2":
        positive = tl.where(x < 0, 0.0, x)
        value = positive * positive
        derivative = 2 * positive
    else:
        if FUNCTION == "silu":
            sigmoid = tl.sigmoid(ALPHA * x)
            slope = ALPHA
        else:
            sigmoid = tl.sigmoid(_TWICE_ROOT * (x + _CUBIC * x * x * x))
            slope = _TWICE_ROOT * (1 + 3 * _CUBIC * x * x)
        value = x * sigmoid
        derivative = sigmoid + value * slope * (1 - sigmoid)
    return value, derivative


@Kernel
def _activate_kernel(
    h, weights, slots, out, bias, ids, P, stride, ids_stride,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * BLOCK
    inside = row < P
    slot = tl.load(slots + row, mask=inside, other=0)
    weight = tl.load(weights + slot_offset(slot, stride, TOP_K), mask=inside, other=0.0).to(tl.float32)
    gate, up = _read(h, row, start, inside, GATED, INTERLEAVED, WIDTH, ROWS, BLOCK)
    if BIASED:
        expert = _experts(ids, slot, inside, ids_stride, TOP_K)
        gate_bias, up_bias = _read(bias, expert, start, inside, GATED, INTERLEAVED, WIDTH, ROWS, BLOCK)
        gate += gate_bias
        up += up_bias
    gate, up = _clamp(gate, up, LIMIT)
    value, _ = _function(gate, FUNCTION, ALPHA)
    if GATED:
        value *= up + UP_OFFSET
    value *= weight[:, None]
    col = start + tl.arange(0, BLOCK)
    mask = inside[:, None] & (col < WIDTH)[None, :]
    tl.store(out + row[:, None] * WIDTH + col[None, :], value.to(out.dtype.element_ty), mask=mask)


@Kernel
def _activate_backward_kernel(
    h, weights, slots, grad, grad_h, out, grad_weights, bias, ids, P, stride, ids_stride,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < P
    slot = tl.load(slots + row, mask=inside, other=0)
    weight = tl.load(weights + slot_offset(slot, stride, TOP_K), mask=inside, other=0.0).to(tl.float32)[:, None]
    expert = slot
    if BIASED:
        expert = _experts(ids, slot, inside, ids_stride, TOP_K)
    grad_weight = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = inside[:, None] & (col < WIDTH)[None, :]
        half = row[:, None] * WIDTH + col[None, :]
        raw_gate, raw_up = _read(h, row, start, inside, GATED, INTERLEAVED, WIDTH, ROWS, BLOCK)
        if BIASED:
            gate_bias, up_bias = _read(bias, expert, start, inside, GATED, INTERLEAVED, WIDTH, ROWS, BLOCK)
            raw_gate += gate_bias
            raw_up += up_bias
        g = tl.load(grad + half, mask=mask, other=0.0).to(tl.float32)
        gate, up = _clamp(raw_gate, raw_up, LIMIT)
        value, derivative = _function(gate, FUNCTION, ALPHA)
        if GATED:
            up += UP_OFFSET
            plain = value * up
        else:
            plain = value
        grad_weight += tl.sum(g * plain, axis=1)
        g *= weight
        tl.store(out + half, (plain * weight).to(out.dtype.element_ty), mask=mask)
        grad_gate = g * derivative
        grad_up = g * value
        if GATED:
            grad_gate *= up
        if LIMIT is not None:
            grad_gate = tl.where(raw_gate > LIMIT, 0.0, grad_gate)
            grad_up = tl.where((raw_up > LIMIT) | (raw_up < -LIMIT), 0.0, grad_up)
        _write(grad_h, row, start, inside, grad_gate, grad_up, GATED, INTERLEAVED, WIDTH, ROWS, BLOCK)
    tl.store(grad_weights + slot, grad_weight.to(grad_weights.dtype.element_ty), mask=inside)


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns per program: the most columns of which at most an eighth idles."""
    blocks = (1024, 512, 256, 128, 64)
    block = next((b for b in blocks if 8 * (triton.cdiv(width, b) * b - width) <= width), None)
    block = block or min(triton.next_power_of_2(width), 1024)
    return max(_TILE // block, 1), block


def _flags(how: Activation, bias: ExpertBias | None) -> tuple[object, ...]:
    """What the kernels are compiled for."""
    interleaved = how.gated and how.interleaved
    return bias is not None, how.function, how.gated, interleaved, how.alpha, how.limit, how.up_offset


def activate(h_PF: Tensor, weights_NK: Tensor, slot_P: Tensor, how: Activation, bias: ExpertBias | None) -> Tensor:
    """See `lightning_ep.ops.activation.activate`."""
    num_pairs, width = h_PF.shape[0], how.width(h_PF)
    out_PI = h_PF.new_empty(num_pairs, width)
    weights_NK = with_unit_stride(weights_NK)
    bias_EF, ids_NK = _operands(bias, h_PF, slot_P)
    sizes = (weights_NK.stride(0), ids_NK.stride(0), weights_NK.shape[1])
    rows, block = _tile(width)
    grid = (triton.cdiv(num_pairs, rows), triton.cdiv(width, block))
    _activate_kernel[grid](
        h_PF, weights_NK, slot_P, out_PI, bias_EF, ids_NK, num_pairs, *sizes, width, rows, block, *_flags(how, bias)
    )
    return out_PI


def activate_backward(
    grad_PI: Tensor, h_PF: Tensor, weights_NK: Tensor, slot_P: Tensor, how: Activation, bias: ExpertBias | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `lightning_ep.ops.activation.activate_backward`."""
    num_pairs, width = grad_PI.shape
    weights_NK = with_unit_stride(weights_NK)
    bias_EF, ids_NK = _operands(bias, h_PF, slot_P)
    sizes = (weights_NK.stride(0), ids_NK.stride(0), weights_NK.shape[1])
    grad_h_PF, out_PI = torch.empty_like(h_PF), torch.empty_like(grad_PI)
    grad_weights_NK = weights_NK.new_zeros(weights_NK.shape)
    rows, block = _tile(width)
    _activate_backward_kernel[(triton.cdiv(num_pairs, rows),)](
        h_PF, weights_NK, slot_P, grad_PI, grad_h_PF, out_PI, grad_weights_NK, bias_EF, ids_NK, num_pairs, *sizes,
        width, rows, block, *_flags(how, bias),
    )  # fmt: skip
    return grad_h_PF, out_PI, grad_weights_NK


def _operands(bias: ExpertBias | None, h_PF: Tensor, slot_P: Tensor) -> tuple[Tensor, Tensor]:
    """The bias and the expert of every slot; anything where there is none, since nothing reads it."""
    if bias is None:
        return h_PF, slot_P
    return bias.bias_EF.contiguous(), with_unit_stride(bias.ids_NK)
