"""Attention over runs of tokens without a mask, compared with a dense mask; for CPUs a stand-in for torch's kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ep import transformers_adapter as adapter
from lightning_ep.context_parallel import SequencePiece, find_documents
from lightning_ep.context_parallel.attention import _attend
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


def varlen_by_loops(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    longest: int,
    key_longest: int,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` with causal windows, one run after the other."""
    assert (bounds.dtype, int(bounds[-1]), int(bounds.diff().max())) == (torch.int32, len(query_THD), longest)
    outputs = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query_THD, key_THD, value_THD))
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        mask = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        mask = mask.to(q.device)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=scale, enable_gqa=enable_gqa)[0]
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)
