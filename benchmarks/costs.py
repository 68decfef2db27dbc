"""What a step costs on paper: floating-point operations, and the time that measured parts budget for it."""

from __future__ import annotations

import math

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
    layer = attention + expert_parameters(sizes) + sizes.hidden * sizes.experts + 2 * sizes.hidden
    return layers * layer + 2 * sizes.vocab * sizes.hidden + sizes.hidden


def expert_parameters(sizes: Sizes) -> int:
    """Parameters of the experts of one layer."""
    return sizes.experts * 3 * sizes.hidden * sizes.moe_intermediate


def device_kind(device_name: str) -> str | None:
    """``H100`` or ``H200``, or None for a device that this file has no figures of."""
    return next((kind for kind in PEAK_FLOPS if kind in device_name), None)


def mfu(cell: Cell, tokens_per_second: float, device_name: str) -> float | None:
    """Share of the device's dense bf16 peak that the model's FLOPs take; None for an unknown device."""
    kind = device_kind(device_name)
    if kind is None:
        return None
    return tokens_per_second * flops_per_token(cell.widths, cell.layers, cell.sequence) / PEAK_FLOPS[kind]


# Measured on an H200, milliseconds, forward and backward: per layer at 16,384 tokens of 4,096-token sequences,
# and per step at that shape, 12 layers over 2 ranks with fp32 masters.
_TOKENS, _SEQUENCE = 16_384, 4_096
_COMPUTE_MS = {"attention projections": 2.9, "attention core": 4.0, "expert GEMMs": 6.0}
_MEMORY_MS = {"glue": 1.7, "norms and rotary": 1.0}
_EXCHANGE_MS, _HOPS = 0.8, 4  # at ep=2: dispatch and combine, forward and backward
_HEAD_AND_LOSS_MS = 55.0
# Passes over weights reach this share of the bandwidth (AdamW, norms and casts on an H200 and an H100: 0.8 to 0.9).
_OF_BANDWIDTH = 0.85

# The forward's share of forward and backward: one of three GEMMs and passes, two of seven products of attention.
_FORWARD = dict.fromkeys((*_COMPUTE_MS, *_MEMORY_MS), 1 / 3) | {"attention core": 2 / 7}
# What backward does again. `selective` leaves out routers and experts; `full` repeats the up projection, two thirds of
# the experts' forward, and the permutation before it, one of the eight or so passes over pairs that glue is.
_AGAIN = {
    "none": {},
    "selective": {name: _FORWARD[name] for name in ("attention projections", "attention core", "norms and rotary")},
}
_AGAIN["full"] = {**_AGAIN["selective"], "expert GEMMs": _FORWARD["expert GEMMs"] * 2 / 3, "glue": 1 / 8}

# The host's, per step and per layer of a compiled model whose layers FSDP gathers four at a time: beside one H200, 16
# cores launched the 48 layers of a rehearsed rank of eight in 312 ms. Recompute as it was before layers were grouped.
_HOST_STEP_MS = 25.0
_HOST_LAYER_MS = {"none": 6.0, "selective": 8.0, "full": 8.0}
# NCCL's exchanges, which a rehearsal does not make, and waiting for their other end: two H200 took 159 ms for a step of
# 12 layers and 1 x 4096 tokens, 28 of them for the optimizer.
_HOST_EXCHANGE_MS = 2.8

# Bytes per parameter that FSDP's copies of experts cost at full bandwidth: before and behind two gathers and a
# reduction, about half of them because experts are sharded along their second dimension (a rehearsed rank of eight at
# ep=1: 6.1 ms per layer of 604 M parameters).
_EXPERT_COPY_BYTES = 48


def estimate_ms(cell: Cell, device_name: str) -> dict[str, float] | None:
    """The budget of the measured parts for one step of ours, scaled to this cell, by part, in GPU milliseconds.

    Compute scales with tokens (the attention core with the sequence too), what is bound by memory also with the
    device's bandwidth, passes over weights with the bytes that they move. Beyond the budget: recompute, clipping, rows
    to more than two ranks, and FSDP around the experts. Exchanges are counted as if nothing hid them. It knows no fixed
    costs of small shapes and no skew.

    Returns:
        None for peers, tensor parallelism, other widths and unknown devices.
    """
    kind = device_kind(device_name)
    if kind is None or cell.sizes != "qwen3-30b-a3b" or not cell.ours or cell.task != "train" or cell.tp > 1:
        return None
    tokens, slower = cell.tokens / _TOKENS, BANDWIDTH["H200"] / BANDWIDTH[kind]
    layer = {name: tokens * ms for name, ms in _COMPUTE_MS.items()}
    layer["attention core"] *= (cell.sequence + 1) / (_SEQUENCE + 1)
    layer |= {name: tokens * slower * ms for name, ms in _MEMORY_MS.items()}
    exchange = tokens * _EXCHANGE_MS * rows_sent(cell.widths, cell.ep) / rows_sent(cell.widths, 2)
    again = sum(layer[name] * part for name, part in _AGAIN[cell.recompute].items())
    forward = sum(layer[name] * part for name, part in _FORWARD.items())
    backward = sum(layer.values()) - forward + again
    parts = {name: cell.layers * ms for name, ms in layer.items()}
    parts["dispatch and combine"] = cell.layers * exchange
    parts["recompute"] = cell.layers * (again + (exchange / _HOPS if cell.recompute == "full" else 0.0))
    parts["FSDP of experts"] = cell.layers * _expert_fsdp_ms(cell, BANDWIDTH[kind], forward, backward)
    parts["head and loss"] = tokens * _HEAD_AND_LOSS_MS
    for name, moved in _bytes_of_weights(cell).items():
        parts[name] = moved / (_OF_BANDWIDTH * BANDWIDTH[kind]) * 1e3
    return parts


def experts_alone(cell: Cell) -> bool:
    """Whether no FSDP reduces the experts' gradients: with fp32 masters they stay in bf16 until AdamW reads them."""
    return cell.ours and cell.ranks == cell.ep and cell.precision == "bf16-mixed"


def local_parameters(cell: Cell) -> tuple[float, float]:
    """Parameters of a rank: of experts, and all others."""
    experts = cell.layers * expert_parameters(cell.widths) / cell.ranks
    return experts, num_parameters(cell.widths, cell.layers) / cell.ranks - experts


def _bytes_of_weights(cell: Cell) -> dict[str, float]:
    """What the passes over a rank's weights read and write in a step. Experts are cast twice if copies do not fit."""
    experts, others = local_parameters(cell)
    each = 2 if cell.precision == "bf16-true" else 4
    gradient = 2 if experts_alone(cell) else each
    moved = {
        "AdamW": experts * (6 * each + gradient) + others * 7 * each,  # weight and moments in and out, gradient in
        "norm": experts * gradient + others * each,
    }
    if cell.precision == "bf16-mixed":
        moved["casts"] = (4 + 2) * ((2 if experts_alone(cell) else 1) * experts + others)
    return moved


def host_ms(cell: Cell) -> float | None:
    """What the host needs to launch a step of ours; None where that was not measured."""
    if not cell.ours or not cell.compile or cell.device != "cuda":
        return None
    exchange = _HOST_EXCHANGE_MS if cell.ep > 1 and not cell.rehearse else 0.0
    return _HOST_STEP_MS + cell.layers * (_HOST_LAYER_MS[cell.recompute] + exchange)


def estimate_tokens_per_second(cell: Cell, device_name: str) -> float | None:
    """Tokens per second and GPU by `estimate_ms`, or by `host_ms` where that is longer.

    With an exchange of tokens the host waits for counts in the first layer until the optimizer step before is done.
    """
    parts = estimate_ms(cell, device_name)
    if parts is None:
        return None
    waits = parts["AdamW"] + parts["norm"] if cell.ep > 1 else 0.0
    return cell.tokens / max(sum(parts.values()), (host_ms(cell) or 0.0) + waits) * 1e3


def rows_sent(sizes: Sizes, ep: int) -> float:
    """Rows that leave a rank per token of a balanced router: one per other rank that holds any expert of the token."""
    others = sizes.experts - sizes.experts // ep
    return (ep - 1) * (1 - math.comb(others, sizes.top_k) / math.comb(sizes.experts, sizes.top_k))


def _expert_fsdp_ms(cell: Cell, bandwidth: float, forward_ms: float, backward_ms: float) -> float:
    """Per layer: FSDP's copies around its collectives, and what of these a layer's arithmetic does not cover.

    Experts are gathered in bf16 in forward and in backward, one layer ahead, and their gradients reduced in fp32.
    Links are as fast as the measured exchange: 64 MiB per hop, four hops in 0.8 ms, 335 GB/s in each direction.
    """
    fsdp = cell.ranks // cell.ep
    if fsdp <= 1:
        return 0.0
    params = expert_parameters(cell.widths) / cell.ep
    link = _HOPS * _TOKENS * rows_sent(cell.widths, 2) * 2 * cell.widths.hidden / (_EXCHANGE_MS * 1e-3)
    gather = (fsdp - 1) / fsdp * 2 * params / link * 1e3
    exposed = max(0.0, gather - forward_ms) + max(0.0, 3 * gather - backward_ms)  # fp32: twice the bytes
    return exposed + params * _EXPERT_COPY_BYTES / bandwidth * 1e3
