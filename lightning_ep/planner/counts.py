"""Counts that no GPU has a say in: floating-point operations, parameters, rows that travel."""

from __future__ import annotations

import math

from lightning_ep.planner.case import Case, ModelWidths


def layer_flops(widths: ModelWidths, sequence: int) -> dict[str, float]:
    """FLOPs of one token in the forward of one layer, by part; a multiply-add is two.

    Attention is causal: a token attends to ``(sequence + 1) / 2`` tokens on average. Of the experts only those that a
    token goes to count.
    """
    query, key_value = widths.heads * widths.head_dim, widths.kv_heads * widths.head_dim
    return {
        "attention projections": 2 * widths.hidden * (query + 2 * key_value) + 2 * query * widths.hidden,
        "attention core": 2 * 2 * query * (sequence + 1) / 2,  # scores and values
        "router": 2 * widths.hidden * widths.experts,
        "expert GEMMs": widths.top_k * 3 * 2 * widths.hidden * widths.moe_intermediate,  # gate, up and down
    }


def flops_per_token(widths: ModelWidths, layers: int, sequence: int) -> float:
    """Model FLOPs of one training token: forward, and backward as twice that. Recompute and embedding do not count."""
    head = 2 * widths.hidden * widths.vocab
    return 3 * (layers * sum(layer_flops(widths, sequence).values()) + head)


def expert_parameters(widths: ModelWidths) -> int:
    """Parameters of the experts of one layer."""
    return widths.experts * 3 * widths.hidden * widths.moe_intermediate


def num_parameters(widths: ModelWidths, layers: int) -> int:
    """Parameters of the whole model: no biases, norms of queries and keys, embedding and head untied."""
    query, key_value = widths.heads * widths.head_dim, widths.kv_heads * widths.head_dim
    attention = widths.hidden * (2 * query + 2 * key_value) + 2 * widths.head_dim
    layer = attention + expert_parameters(widths) + widths.hidden * widths.experts + 2 * widths.hidden
    return layers * layer + 2 * widths.vocab * widths.hidden + widths.hidden


def local_parameters(case: Case) -> tuple[float, float]:
    """Parameters of a rank, of experts and all others: every layout shards both over all ranks."""
    experts = case.layers * expert_parameters(case.widths) / case.ranks
    return experts, num_parameters(case.widths, case.layers) / case.ranks - experts


def rows_sent(widths: ModelWidths, ep: int) -> float:
    """Rows that leave a rank per token of a balanced router: one per other rank that holds any expert of the token."""
    elsewhere = widths.experts - widths.experts // ep
    return (ep - 1) * (1 - math.comb(elsewhere, widths.top_k) / math.comb(widths.experts, widths.top_k))


def rows_received(widths: ModelWidths, ep: int) -> float:
    """Rows that reach a rank's experts, per token of a rank: as many from the own rank as from any other."""
    return rows_sent(widths, ep) * ep / (ep - 1) if ep > 1 else 1.0
