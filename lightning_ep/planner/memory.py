"""What a rank allocates at the end of forward, where its memory is fullest."""

from __future__ import annotations

from lightning_ep.planner.case import QWEN3_30B_A3B, Case
from lightning_ep.planner.counts import expert_parameters, local_parameters, rows_received

_GIB = 2**30
_SPARE = 0.1  # of the memory, left free beside kept copies (`moe/master_weights.py`)

# Kept per token and layer, KiB, from runs on one H200 (6 layers, 4 x 4096): what `full` keeps is the layer's input (4)
# and the routing, and what `none` keeps beyond `selective` are the attention and the norms. They grow with the width.
_INPUT_AND_ROUTING_KIB = 7.8
_DENSE_KIB = {True: 35.2, False: 69.0}  # compiled, eager

_CHUNK = 4096  # tokens whose logits the loss holds at a time


def peak_gib(case: Case, limit_gib: float) -> float:
    """Largest allocation of a rank, GiB, whether it fits into ``limit_gib`` (see `allocatable_gib`) or not."""
    return sum(memory_gib(case, limit_gib).values())


def memory_gib(case: Case, limit_gib: float) -> dict[str, float]:
    """The same by what it is for.

    Gradients of the step before are there until backward starts, as Lightning has it. Copies of the experts' weights
    are kept by the rule of `lightning_ep.moe.master_weights`: where they leave a tenth of ``limit_gib`` free.
    """
    parts = {
        "weights, gradients, moments": _state(case) / _GIB,
        "activations": case.layers * case.tokens * _kept_kib(case) * 2**10 / _GIB,
        "the loss, or a layer at work": max(_loss(case), _layer_at_work(case)) / _GIB,
    }
    copies = 2 * local_parameters(case)[0] / _GIB if case.narrow_gradients else 0.0
    kept = sum(parts.values()) + copies + _SPARE * limit_gib <= limit_gib
    return {**parts, "copies of experts in bf16": copies if kept else 0.0}


def _state(case: Case) -> float:
    """Bytes of parameters, gradients and two moments, sharded over all ranks in every layout."""
    experts, others = local_parameters(case)
    return 4 * case.weight_bytes * others + (3 * case.weight_bytes + case.expert_gradient_bytes) * experts


def _kept_kib(case: Case) -> float:
    """Per token and layer: received rows (bf16) and the up projection's output for each pair, see docs/experts.md."""
    widths = case.widths
    wider = widths.hidden / QWEN3_30B_A3B.hidden
    rows = rows_received(widths, case.ep) * 2 * widths.hidden
    experts = (rows + widths.top_k * 4 * widths.moe_intermediate) / 2**10
    kept = {"none": experts + wider * _DENSE_KIB[case.compile], "selective": experts, "full": 0.0}
    return wider * _INPUT_AND_ROUTING_KIB + kept[case.recompute]


def _loss(case: Case) -> float:
    """Bytes of a chunk of logits, the head with its gradient in bf16, that one's sum in fp32, the hidden states'."""
    head = case.widths.vocab * case.widths.hidden
    logits = min(case.tokens, _CHUNK) * case.widths.vocab
    return 2 * logits + (2 + 2 + 4) * head + 2 * case.tokens * case.widths.hidden


def _layer_at_work(case: Case) -> float:
    """Bytes of the experts in bf16 (gathered one layer ahead if FSDP shards them), and of their rows in and out."""
    widths = case.widths
    layers = 2 if case.fsdp > 1 else 1
    weights = layers * 2 * expert_parameters(widths) / case.ep
    return weights + case.tokens * widths.top_k * 2 * (2 * widths.hidden + widths.moe_intermediate)
