"""What a step costs on paper: floating-point operations, and the time that DESIGN section 7 budgets for it."""

from __future__ import annotations

from benchmarks.cells import Cell, Sizes

# Dense bf16 of the tensor cores, FLOP/s (vendor data sheets, without sparsity), and memory bandwidth, bytes/s.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}


def flops_per_token(sizes: Sizes, layers: int, sequence: int) -> float:
    """Model FLOPs of one training token, forward and backward, without recompute.

    A multiply-add is two. Attention is causal: a token attends to ``(sequence + 1) / 2`` tokens on average. Of the
    experts only the active ones count, and embeddings are no arithmetic. Backward is twice the forward.
    """
    query, key_value = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    projections = 2 * sizes.hidden * (query + 2 * key_value) + 2 * query * sizes.hidden
    core = 2 * 2 * query * (sequence + 1) / 2  # scores and values
    router = 2 * sizes.hidden * sizes.experts
    experts = sizes.top_k * 3 * 2 * sizes.hidden * sizes.moe_intermediate  # gate, up and down
    head = 2 * sizes.hidden * sizes.vocab
    return 3 * (layers * (projections + core + router + experts) + head)


def num_parameters(sizes: Sizes, layers: int) -> int:
    """Parameters of the whole model, embedding and head untied."""
    query, key_value = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    attention = sizes.hidden * (2 * query + 2 * key_value) + 2 * sizes.head_dim
    experts = sizes.experts * 3 * sizes.hidden * sizes.moe_intermediate
    layer = attention + experts + sizes.hidden * sizes.experts + 2 * sizes.hidden
    return layers * layer + 2 * sizes.vocab * sizes.hidden + sizes.hidden


def device_kind(device_name: str) -> str | None:
    """``H100`` or ``H200``, or None for a device that this file has no figures of."""
    return next((kind for kind in PEAK_FLOPS if kind in device_name), None)


def mfu(cell: Cell, tokens_per_second: float, device_name: str) -> float | None:
    """Share of the device's dense bf16 peak that the model's FLOPs take; None for an unknown device."""
    kind = device_kind(device_name)
    if kind is None:
        return None
    return tokens_per_second * flops_per_token(cell.widths, cell.layers, cell.sequence) / PEAK_FLOPS[kind]


# DESIGN section 7, milliseconds, forward and backward, on an H200: per layer at 16,384 tokens of 4,096-token
# sequences, and per step at that shape, 12 layers over 2 ranks with fp32 masters.
_TOKENS, _SEQUENCE = 16_384, 4_096
_COMPUTE_MS = {"attention projections": 2.9, "attention core": 4.0, "expert GEMMs": 6.0}
_MEMORY_MS = {"glue": 1.7, "norms and rotary": 1.0}
_EXCHANGE_MS = 0.8
_CASTS_MS = 0.9
_HEAD_AND_LOSS_MS = 55.0
_ADAMW_MS, _ADAMW_LAYERS, _ADAMW_RANKS = 32.0, 12, 2


def estimate_ms(cell: Cell, device_name: str) -> dict[str, float] | None:
    """The budget of DESIGN section 7 for one step of ours, scaled to this cell, by part, in milliseconds.

    Compute scales with tokens (the attention core with the sequence too), what is bound by memory also with the
    device's bandwidth, casts and AdamW with parameters per rank (AdamW on bf16 states moves half the bytes). It knows
    no launch overhead, no exposed gathers of FSDP and no skew: what a run takes beyond it is to be explained.

    Returns:
        None for peers, recompute, other widths and unknown devices.
    """
    kind = device_kind(device_name)
    ours = cell.trainer.startswith("lightning_ep") and cell.recompute == "none"
    if kind is None or cell.sizes != "qwen3-30b-a3b" or not ours:
        return None
    tokens, slower = cell.tokens / _TOKENS, BANDWIDTH["H200"] / BANDWIDTH[kind]
    share = num_parameters(cell.widths, cell.layers) / cell.ranks
    reference = num_parameters(cell.widths, _ADAMW_LAYERS) / _ADAMW_RANKS
    mixed = cell.precision == "bf16-mixed"
    parts = {name: cell.layers * tokens * ms for name, ms in _COMPUTE_MS.items()}
    parts["attention core"] *= (cell.sequence + 1) / (_SEQUENCE + 1)
    parts |= {name: cell.layers * tokens * slower * ms for name, ms in _MEMORY_MS.items()}
    parts["dispatch and combine"] = cell.layers * tokens * _EXCHANGE_MS if cell.ep > 1 else 0.0
    parts["casts"] = _ADAMW_LAYERS * _CASTS_MS * slower * share / reference if mixed else 0.0
    parts["head and loss"] = tokens * _HEAD_AND_LOSS_MS
    parts["AdamW"] = _ADAMW_MS * slower * share / reference * (1.0 if mixed else 0.5)
    return parts


def estimate_tokens_per_second(cell: Cell, device_name: str) -> float | None:
    """`estimate_ms` as tokens per second and GPU."""
    parts = estimate_ms(cell, device_name)
    return None if parts is None else cell.tokens / sum(parts.values()) * 1e3
