"""Causal attention of documents that lie one after the other in rows: torch's kernel, and the mask that says the same.

Letters: T = B S tokens in all, N documents, D width of a head, Dv of its values.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

_WIDEST = 256  # head of FlashAttention
_ASKS_FOR_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # older ones just take fewer key heads


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attend_documents` may run there: FlashAttention knows GPUs and numbers of 16 bits only."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def kernel_serves(query_BHSD: Tensor, value_BHSD: Tensor, dropout: float) -> bool:
    """Whether `attend_documents` can take these, so that no mask of all pairs is needed."""
    width, value_width = query_BHSD.shape[-1], value_BHSD.shape[-1]
    fits = width <= _WIDEST and width % 8 == 0 and value_width <= width
    return fits and dropout == 0 and has_kernel(query_BHSD.device, query_BHSD.dtype)


def to_device(bounds: Tensor, device: torch.device) -> Tensor:
    """Bounds that the host has made, on the device; the host does not wait."""
    return bounds.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else bounds


def attend_documents(
    query_BHSD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    bounds: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """FlashAttention over documents (Dao, 2023, arXiv:2307.08691), in time and memory of their pairs alone.

    Args:
        query_BHSD: bf16 or fp16 ``[B, H, S, D]``, as `kernel_serves` asks for.
        key_BHSD: ``[B, H / groups, S, D]``.
        value_BHSD: ``[B, H / groups, S, Dv]``.
        bounds: int32 ``[N + 1]``, where documents begin in the ``T`` tokens, and their end. None crosses a row.
        longest: Tokens of the longest one, or more: the kernel makes room for as many of each.
        scaling: Factor of the scores. Default: ``D ** -0.5``.
        window: How many tokens a token sees, itself included. Default: all before it in its document.

    Returns:
        ``[B, S, H, Dv]``.
    """
    batch, _, length, width = query_BHSD.shape
    value_width = value_BHSD.shape[-1]
    if value_width < width:
        value_BHSD = F.pad(value_BHSD, (0, width - value_width))
    # Contiguous: what torch.compile is told of the outputs' strides is so for contiguous inputs only.
    q_THD, k_THD, v_THD = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (query_BHSD, key_BHSD, value_BHSD))
    more: dict[str, Any] = {"enable_gqa": True} if _ASKS_FOR_GQA else {}
    more |= {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    out_THD = varlen_attn(q_THD, k_THD, v_THD, bounds, bounds, longest, longest, **more)
    assert isinstance(out_THD, Tensor)
    return out_THD.unflatten(0, (batch, length))[..., :value_width]


def documents_mask(bounds: Tensor, batch: int, length: int, window: int | None) -> Tensor:
    """The mask with which any attention does what `attend_documents` does; the host does not wait for it.

    Args:
        bounds: As there.
        batch: B.
        length: S.
        window: As there.

    Returns:
        bool ``[B, 1, S, S]``, true where a token sees another.
    """
    tokens_T = torch.arange(batch * length, dtype=bounds.dtype, device=bounds.device)
    document_BS = torch.searchsorted(bounds, tokens_T, right=True).view(batch, length)
    place_S = tokens_T[:length]
    back_SS = place_S[:, None] - place_S
    seen_SS = (back_SS >= 0) if window is None else (back_SS >= 0) & (back_SS < window)
    return (seen_SS & (document_BS[:, :, None] == document_BS[:, None, :]))[:, None]
