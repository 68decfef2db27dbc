"""Counts that no GPU has a say in: floating-point operations, parameters, rows that travel."""

from __future__ import annotations

import math

from lightning_ep.planner.case import Case
from lightning_ep.planner.widths import ModelWidths


def attention_matrices(widths: ModelWidths) -> int:
    """Elements of the matrices that a token is multiplied with in one layer of softmax attention."""
    hidden, latent = widths.hidden, widths.latent
    if latent is None:
        queries = 2 * widths.query if widths.gated_attention else widths.query
        return hidden * (queries + widths.keys_and_values + widths.value)
    queries = latent.query_rank * (hidden + widths.query) if latent.query_rank else hidden * widths.query
    keys_and_values = hidden * (latent.rank + latent.rope_dim)
    keys_and_values += latent.rank * widths.heads * (latent.key_dim + latent.value_dim)
    return queries + keys_and_values + widths.value * hidden


def linear_matrices(widths: ModelWidths) -> int:
    """The same in one layer of linear attention."""
    if widths.linear is None:
        return 0
    linear = widths.linear
    keys, values = linear.key_heads * linear.key_dim, linear.value_heads * linear.value_dim
    return widths.hidden * (2 * keys + 2 * values + 2 * linear.value_heads + values)


def dense_matrices(widths: ModelWidths, layers: int) -> int:
    """Elements of the MLPs that every token goes through: those of dense layers, and shared experts."""
    experts = widths.expert_layers(layers)
    width = (layers - experts) * widths.dense_intermediate + experts * widths.shared_intermediate
    return 3 * widths.hidden * width


def model_flops(widths: ModelWidths, layers: int, sequence: int) -> dict[str, float]:
    """FLOPs of one token in the forward of so many layers, by part; a multiply-add is two.

    Attention is causal: a token attends to ``(sequence + 1) / 2`` tokens on average, or to those of its window. Of the
    experts only those that a token goes to count. Linear attention's state is read and written about four times.
    """
    linear = widths.linear_layers(layers)
    softmax, experts = layers - linear, widths.expert_layers(layers)
    windowed = widths.windowed * softmax
    seen = (softmax - windowed) * _attended(sequence, sequence) + windowed * _attended(sequence, widths.window)
    state = 0
    if widths.linear is not None:
        state = widths.linear.value_heads * widths.linear.key_dim * widths.linear.value_dim
    return {
        "attention projections": 2 * (softmax * attention_matrices(widths) + linear * linear_matrices(widths)),
        "attention core": 2 * (widths.query + widths.value) * seen + 2 * 4 * linear * state,  # scores and values
        "dense MLPs": 2 * dense_matrices(widths, layers),
        "router": 2 * experts * widths.hidden * (widths.experts + widths.shared_gate),
        "expert GEMMs": experts * widths.top_k * 3 * 2 * widths.hidden * widths.moe_intermediate,  # gate, up and down
    }


def _attended(sequence: int, window: int) -> float:
    """Tokens that a token attends to on average, itself among them."""
    window = min(window, sequence)
    return (window * (window + 1) / 2 + (sequence - window) * window) / sequence


def flops_per_token(widths: ModelWidths, layers: int, sequence: int) -> float:
    """Model FLOPs of one training token: forward, and backward as twice that. Recompute and embedding do not count."""
    head = 2 * widths.hidden * widths.vocab
    return 3 * (sum(model_flops(widths, layers, sequence).values()) + head)


def expert_parameters(widths: ModelWidths) -> int:
    """Parameters of the experts of one layer."""
    each = 3 * widths.hidden * widths.moe_intermediate
    if "experts" in widths.biases:
        each += 2 * widths.moe_intermediate + widths.hidden
    return widths.experts * each


def num_parameters(widths: ModelWidths, layers: int) -> int:
    """Parameters of the whole model."""
    experts = widths.expert_layers(layers)
    linear = widths.linear_layers(layers)
    each_expert_layer = expert_parameters(widths) + widths.hidden * widths.experts
    each_expert_layer += widths.experts * ("router" in widths.biases) + widths.hidden * widths.shared_gate
    return (
        (layers - linear) * (attention_matrices(widths) + _small_of_attention(widths))
        + linear * (linear_matrices(widths) + _small_of_linear(widths))
        + experts * each_expert_layer
        + dense_matrices(widths, layers)
        + layers * 2 * widths.hidden
        + (1 if widths.tied else 2) * widths.vocab * widths.hidden
        + widths.hidden
    )


def _small_of_attention(widths: ModelWidths) -> int:
    """Norms, biases and sinks of one layer of attention."""
    latent = widths.latent
    found = widths.heads * widths.sinks
    if latent is not None:
        return found + latent.query_rank + latent.rank  # norms of the latents
    keys = widths.keys_and_values // 2
    found += {"head": 2 * widths.head_dim, "all": widths.query + keys, "none": 0}[widths.qk_norm]
    found += (widths.query * (2 if widths.gated_attention else 1) + 2 * keys) * ("qkv" in widths.biases)
    return found + widths.hidden * ("output" in widths.biases)


def _small_of_linear(widths: ModelWidths) -> int:
    """Convolution, decays and norm of one layer of linear attention."""
    if widths.linear is None:
        return 0
    linear = widths.linear
    channels = 2 * linear.key_heads * linear.key_dim + linear.value_heads * linear.value_dim
    return channels * linear.kernel + 2 * linear.value_heads + linear.value_dim


def active_parameters(widths: ModelWidths, layers: int) -> int:
    """Parameters that work on a token: all but those of experts that it does not go to."""
    idle = widths.expert_layers(layers) * expert_parameters(widths) * (widths.experts - widths.top_k) // widths.experts
    return num_parameters(widths, layers) - idle


def expert_adapters(widths: ModelWidths, layers: int, rank: int) -> int:
    """Parameters of low-rank adapters of all experts: of gate and up as one matrix, and of down."""
    each = rank * (widths.hidden + 2 * widths.moe_intermediate + widths.moe_intermediate + widths.hidden)
    return widths.expert_layers(layers) * widths.experts * each


def attention_adapters(widths: ModelWidths, layers: int, rank: int) -> int:
    """Parameters of low-rank adapters (arXiv:2106.09685) of all matrices of attention."""
    hidden, latent = widths.hidden, widths.latent
    linear = widths.linear_layers(layers)
    if latent is not None:
        matrices = [(hidden, latent.query_rank), (latent.query_rank, widths.query)]
        matrices = matrices if latent.query_rank else [(hidden, widths.query)]
        matrices += [(hidden, latent.rank + latent.rope_dim), (widths.value, hidden)]
        matrices += [(latent.rank, widths.heads * (latent.key_dim + latent.value_dim))]
    else:
        keys = widths.keys_and_values // 2
        queries = 2 * widths.query if widths.gated_attention else widths.query
        matrices = [(hidden, queries), (hidden, keys), (hidden, keys), (widths.value, hidden)]
    return (layers - linear) * rank * sum(rows + columns for rows, columns in matrices)


def local_adapters(case: Case) -> float:
    """Parameters of the adapters of a rank."""
    found = attention_adapters(case.widths, case.layers, case.lora_rank)
    found += expert_adapters(case.widths, case.layers, case.lora_rank) if case.lora_experts else 0
    return found / case.shards


def local_parameters(case: Case) -> tuple[float, float]:
    """Parameters of a rank, of experts and all others: every layout shards both over all ranks of a copy."""
    experts = case.widths.expert_layers(case.layers) * expert_parameters(case.widths) / case.shards
    return experts, num_parameters(case.widths, case.layers) / case.shards - experts


def rows_sent(widths: ModelWidths, ep: int) -> float:
    """Rows that leave a rank per token of a balanced router: one per other rank that holds any expert of the token."""
    elsewhere = widths.experts - widths.experts // ep
    return (ep - 1) * (1 - math.comb(elsewhere, widths.top_k) / math.comb(widths.experts, widths.top_k))


def rows_received(widths: ModelWidths, ep: int) -> float:
    """Rows that reach a rank's experts, per token of a rank: as many from the own rank as from any other."""
    return rows_sent(widths, ep) * ep / (ep - 1) if ep > 1 else 1.0
