"""What a rank allocates where its memory is fullest: at the end of forward, or where backward begins."""

from __future__ import annotations

from lightning_ep.planner.case import Case
from lightning_ep.planner.counts import (
    expert_parameters,
    local_adapters,
    local_parameters,
    num_parameters,
    rows_received,
)
from lightning_ep.planner.widths import QWEN3_30B_A3B, ModelWidths

_GIB = 2**30
_SPARE = 0.1  # of the memory, left free beside kept copies (`moe/master_weights.py`)

# Kept per token and layer, KiB, from runs on one H200 (6 layers, 4 x 4096): what `full` keeps is the layer's input (4)
# and the routing, and what `none` keeps beyond `selective` are the attention and the norms. They grow with the width.
_INPUT_AND_ROUTING_KIB = 7.8
_DENSE_KIB = {True: 35.2, False: 69.0}  # compiled, eager

_CHUNK = 4096  # tokens whose logits the loss holds at a time
_GROUPED = 160_000_000  # parameters that FSDP gathers together (`fsdp/groups.py`)


def peak_gib(case: Case, limit_gib: float) -> float:
    """Largest allocation of a rank, GiB, whether it fits into ``limit_gib`` (see `allocatable_gib`) or not."""
    return sum(memory_gib(case, limit_gib).values())


def memory_gib(case: Case, limit_gib: float) -> dict[str, float]:
    """The same by what it is for.

    Gradients of the step before are there until backward starts, as Lightning has it; with accumulation they stay.
    Copies of the experts' weights are kept by the rule of `lightning_ep.moe.master_weights`: where they leave a tenth
    of ``limit_gib`` free.
    """
    parts = _state(case)
    keeping = 0 if case.recompute == "full" else case.widths.expert_layers(case.layers)
    parts["activations"] = case.layers * case.tokens * _kept_kib(case, case.recompute) * 2**10
    parts["rows of the experts"] = keeping * case.tokens * _rows_kib(case) * 2**10
    backward = _layer_backward(case) - (parts["gradients"] if case.accumulate == 1 else 0.0)
    parts["buffers"] = max(_loss(case), _layer_at_work(case), backward) + _gathered(case)
    found = {name: size / _GIB for name, size in parts.items()}
    own = not case.managed_experts and case.precision == "bf16-mixed" and not case.lora_rank
    copies = 2 * local_parameters(case)[0] / _GIB if own else 0.0
    fits = sum(found.values()) + copies + _SPARE * limit_gib <= limit_gib
    return {**found, "copies of experts in bf16": copies if fits else 0.0}


def _state(case: Case) -> dict[str, float]:
    """Bytes of weights, gradients and moments, sharded over all ranks of a copy in every layout."""
    experts, others = local_parameters(case)
    each, moments = case.weight_bytes, 2 * case.moment_bytes
    if case.lora_rank:
        adapters = local_adapters(case)
        return {"weights": 2 * (experts + others) + each * adapters, "gradients": each * adapters,
                "optimizer": moments * adapters}  # fmt: skip
    gradients = case.expert_gradient_bytes * experts + each * others
    return {"weights": each * (experts + others), "gradients": gradients, "optimizer": moments * (experts + others)}


def _rows_kib(case: Case) -> float:
    """Per token and layer: received rows (bf16) and up's output for each pair, see docs/reference/experts.md."""
    widths = case.widths
    rows = rows_received(widths, case.ep) * 2 * widths.hidden
    return case.skew * (rows + widths.top_k * 4 * widths.moe_intermediate) / 2**10


def _kept_kib(case: Case, recompute: str) -> float:
    """Per token and layer, without the experts' rows: the input, and what attention and dense MLPs keep."""
    widths = case.widths
    kept = widths.hidden / QWEN3_30B_A3B.hidden * _INPUT_AND_ROUTING_KIB
    if recompute != "none":
        return kept
    experts = widths.expert_layers(case.layers)
    mlps = (case.layers - experts) * widths.dense_intermediate + experts * widths.shared_intermediate
    kept += _attention_width(widths) / _attention_width(QWEN3_30B_A3B) * _DENSE_KIB[case.compile]
    return kept + 3 * 2 * mlps / case.layers / 2**10  # gate, up and their product


def _attention_width(widths: ModelWidths) -> int:
    """What kept tensors of attention and norms grow with: queries, keys, values, outputs and some hidden states."""
    return widths.query + widths.keys_and_values + widths.value + 3 * widths.hidden


def _loss(case: Case) -> float:
    """Bytes of a chunk of logits, the head with its gradient in bf16, that one's sum in fp32, the hidden states'.

    As the runs were that this is held against; since then the head's gradient is cast when the logits are gone.
    """
    head = case.widths.vocab * case.widths.hidden / case.tp
    logits = min(case.tokens * case.tp, _CHUNK) * case.widths.vocab / case.tp
    return 2 * logits + (2 + (0 if case.lora_rank else 2 + 4)) * head + 2 * case.tokens * case.widths.hidden


def _expert_weights(case: Case) -> float:
    """Bytes of the experts in bf16 (gathered one layer ahead if FSDP shards them) beside those that a rank holds."""
    cast = case.precision == "bf16-mixed" and not case.lora_rank
    layers = 2 if case.fsdp > 1 else int(cast)
    return layers * 2 * expert_parameters(case.widths) / case.ep


def _layer_at_work(case: Case) -> float:
    """Bytes of the experts' weights of a layer, and of their rows in and out."""
    widths = case.widths
    rows = case.tokens * case.skew * widths.top_k * 2 * (2 * widths.hidden + widths.moe_intermediate)
    return _expert_weights(case) + rows


def _layer_backward(case: Case) -> float:
    """The same in backward: what recompute makes again, and gradients on their way, in bf16 and fp32."""
    again = 0.0
    if case.recompute != "none":
        again = case.tokens * 2**10 * (_kept_kib(case, "none") + (_rows_kib(case) if case.recompute == "full" else 0))
    gradients = 0.0 if case.lora_rank else (2 + 4) * expert_parameters(case.widths) / case.ep
    return _layer_at_work(case) + again + (gradients if case.managed_experts else 0.0)


def _gathered(case: Case) -> float:
    """Bytes of what FSDP has gathered of all but experts: two groups of layers and the embedding, in bf16.

    With accumulation gradients stay whole, in fp32, until the last micro-batch (`fsdp/accumulation.py`).
    """
    if case.shards == 1:
        return 0.0
    widths = case.widths
    held = num_parameters(widths, case.layers) - widths.expert_layers(case.layers) * expert_parameters(widths)
    embedding = widths.vocab * widths.hidden
    layer = (held - (1 if widths.tied else 2) * embedding) / case.layers
    group = layer * (1 if case.managed_experts else max(1, _GROUPED // max(1, int(layer))))
    whole = 4 * held if case.accumulate > 1 and not case.lora_rank else 0.0
    return (2 * 2 * min(group, case.layers * layer) + 2 * embedding + whole) / case.tp
