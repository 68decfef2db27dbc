"""Attention over documents, compared with a dense mask; and torch's kernel for it on CPUs, in plain matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from lightning_ep import transformers_adapter as adapter
from lightning_ep.context_parallel import SequencePiece, attention, find_documents
from lightning_ep.context_parallel.attention import _attend
from lightning_ep.transformers_adapter import document_bounds
from tests.ranks import device
from tests.reference import relative_error

PACKED = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([50, 1, 77], [128])])
PADDED = (torch.arange(128) >= torch.tensor([[60], [0]])).long()
SHAPES = [(4, 64, None), (2, 64, None), (1, 64, 7), (4, 40, None)]  # KV heads (of 4 heads), width of values, window


def documents_error(
    positions: Tensor | None, mask: Tensor | None, kv_heads: int, value_dim: int, window: int | None
) -> float:
    """Largest error of output and gradients of attention over runs of tokens, against a dense mask in float64."""
    torch.manual_seed(0)
    batch, length = (positions if positions is not None else mask).shape  # type: ignore[union-attr]
    shapes = [(4, 64), (kv_heads, 64), (kv_heads, value_dim)]
    leaves = [torch.randn(batch, heads, length, dim, device=device()).bfloat16() for heads, dim in shapes]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    documents = find_documents(positions, mask)
    bounds = documents.bounds.to(device()) if documents.bounds is not None else None
    described: Any = [None if t is None else t.to(device()) for t in (positions, mask)]
    piece = SequencePiece(None, batch, length, *described, documents, bounds)  # type: ignore[arg-type]
    # No module, so that any other way than the one without a mask fails.
    out = _attend(None, "sdpa", *leaves, piece, scaling=0.125, sliding_window=window)  # type: ignore[arg-type]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    key, value = (x.repeat_interleave(4 // kv_heads, dim=1) for x in exact[1:])
    dense = adapter.causal_mask("sdpa", batch, length, window, *described, torch.float64, device())
    expected = F.scaled_dot_product_attention(exact[0], key, value, attn_mask=dense, scale=0.125).transpose(1, 2)
    counts = torch.ones(batch, length) if mask is None else mask  # what padding gives is not defined
    grad = (torch.randn(batch, length, 4, value_dim) * counts[:, :, None, None]).to(device())
    found = torch.autograd.grad(out, leaves, grad.bfloat16())
    wanted = torch.autograd.grad(expected, exact, grad.bfloat16().double())
    valid = counts.to(device())[:, :, None, None]
    pairs = [(out * valid, (expected * valid).nan_to_num()), *zip(found, wanted, strict=True)]
    return max(relative_error(a, b.nan_to_num()) for a, b in pairs)


# ------------------------------------------------------------------------------------------------ the kernel on a CPU


@contextmanager
def kernel_on_cpu() -> Iterator[list[tuple[int, ...]]]:
    """Inside, attention over documents runs the code that runs on GPUs, in any dtype, with the kernel's maths on a CPU.

    Yields:
        The lengths of the documents of every call.
    """
    _calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        for module in (attention, document_bounds):
            patch.setattr(module, "kernel_serves", lambda *_: True)
        yield _calls


_calls: list[tuple[int, ...]] = []


def _forward(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    key_bounds, longest, key_longest, is_causal, scale, window = others[:6]
    assert (bounds.dtype, bounds.is_contiguous(), int(bounds[-1])) == (torch.int32, True, len(query))
    assert bounds is key_bounds or bounds.equal(key_bounds)
    assert int(bounds.diff().max()) == longest == key_longest, "the kernel leaves out what is longer, or idles"
    assert is_causal == (window[0] < 0)
    assert all(x.is_contiguous() for x in (query, key, value))
    _calls.append(tuple(bounds.diff().tolist()))
    out, logs = torch.empty_like(query), torch.empty(query.shape[1], len(query))
    for tokens, (_, _, v, weights, log) in _documents(query, key, value, bounds, scale, window[0]):
        out[tokens], logs[:, tokens] = (weights @ v).transpose(0, 1).to(query.dtype), log.float()
    return out, logs, torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logs: Tensor, bounds: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, scale, window = others
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    for tokens, (q, k, v, weights, _) in _documents(query, key, value, bounds, scale, window[0]):
        grad = grad_out[tokens].transpose(0, 1).double()
        of_weights = grad @ v.transpose(1, 2)
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * _scale(query, scale)
        parts = (of_scores @ k, of_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ grad)
        for total, part in zip(grads, parts, strict=True):
            heads = part if total is grads[0] else part.unflatten(0, (-1, groups)).sum(1)
            total[tokens] = heads.transpose(0, 1)
    dq, dk, dv = (total.to(query.dtype) for total in grads)
    return dq, dk, dv


def _documents(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float | None, left: int
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Of each document: its tokens, and by head in float64 query, key, value, weights and logarithms of their sums."""
    groups = query.shape[1] // key.shape[1]
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        tokens = slice(start, end)
        q, k, v = (x[tokens].transpose(0, 1).double() for x in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (back < 0) | ((back > left) if left >= 0 else torch.zeros_like(back, dtype=torch.bool))
        scores = (q @ k.transpose(1, 2) * _scale(query, scale)).masked_fill(hidden, float("-inf"))
        yield tokens, (q, k, v, scores.softmax(-1), scores.logsumexp(-1))


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


varlen._varlen_attn.register_kernel("cpu")(_forward)
varlen._varlen_attn_backward.register_kernel("cpu")(_backward)
