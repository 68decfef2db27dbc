"""What is expected of a cell before it runs: its speed by `benchmarks.costs`, and its memory."""

from __future__ import annotations

from benchmarks import costs
from benchmarks.cells import Cell

_GIB = 2**30

# Memory of the card, GiB, and what the estimate of allocations leaves of it to CUDA's context, NCCL's buffers and the
# allocator's fragments (3 to 4 GiB reserved beyond the peak on one H200).
CAPACITY_GIB = {"H100": 79.0, "H200": 139.0}
_BESIDE_GIB = 4.0
_SPARE = 0.1  # of it beside kept copies

# Kept per token and layer, KiB, from runs on one H200 (6 layers, 4 x 4096): what `full` keeps is the layer's input (4)
# and the routing, and what `none` keeps beyond `selective` are the attention and the norms.
_INPUT_AND_ROUTING_KIB = 7.8
_DENSE_KIB = {True: 35.2, False: 69.0}  # compiled, eager

# One H200's local disk (docs/checkpoints.md): a cold load, a save at once. As if ranks shared it, and nothing else did.
_DISK_GB_PER_S = {"save": 0.79, "load": 2.3}

_CHUNK = 4096  # tokens whose logits the loss holds at a time


def estimates(cell: Cell, device_name: str) -> dict[str, float | None]:
    """What goes into a cell's record before it runs; None where nothing is known."""
    if cell.task == "weights":
        gb = 2 * costs.num_parameters(cell.widths, cell.layers) / 1e9
        known = cell.device == "cuda"
        return {f"estimate_{what}_s": gb / rate if known else None for what, rate in _DISK_GB_PER_S.items()}
    return {
        "estimate_tokens_per_second": costs.estimate_tokens_per_second(cell, device_name),
        "estimate_peak_gib": peak_gib(cell, device_name),
    }


def peak_gib(cell: Cell, device_name: str) -> float | None:
    """Largest allocation of a rank, at the end of forward: state, activations of all layers, and loss or last layer.

    Gradients of the step before are there until backward starts, as Lightning has it. The router is balanced. Copies of
    the experts' weights are kept by the rule of `lightning_ep.moe.master_weights`.

    Returns:
        None for peers, tensor parallelism, other widths, CPUs and unknown devices.
    """
    limit = limit_gib(cell, device_name)
    known = cell.sizes == "qwen3-30b-a3b" and cell.ours and cell.task == "train" and cell.tp == 1
    if cell.device != "cuda" or not known or limit is None:
        return None
    parts = (_state(cell), cell.layers * cell.tokens * _kept_kib(cell) * 2**10, max(_loss(cell), _layer_at_work(cell)))
    peak = sum(parts) / _GIB
    copies = 2 * costs.local_parameters(cell)[0] / _GIB if costs.experts_alone(cell) else 0.0
    return peak + (copies if peak + copies + _SPARE * limit <= limit else 0.0)


def limit_gib(cell: Cell, device_name: str) -> float | None:
    """What a rank may allocate; None for an unknown device."""
    kind = costs.device_kind(device_name)
    if kind is None:
        return None
    return min(CAPACITY_GIB[kind] - _BESIDE_GIB, cell.memory_cap_gib or float("inf"))


def _state(cell: Cell) -> float:
    """Parameters, gradients and two moments, sharded over all ranks in every layout."""
    each = 2 if cell.precision == "bf16-true" else 4
    experts, others = costs.local_parameters(cell)
    return 4 * each * others + (3 * each + (2 if costs.experts_alone(cell) else each)) * experts


def _kept_kib(cell: Cell) -> float:
    """Per token and layer: received rows (bf16) and the up projection's output for each pair, see docs/experts.md."""
    sizes = cell.widths
    # A balanced router sends as many rows to the own rank as to any other.
    received = costs.rows_sent(sizes, cell.ep) * cell.ep / (cell.ep - 1) if cell.ep > 1 else 1.0
    experts = (received * 2 * sizes.hidden + sizes.top_k * 4 * sizes.moe_intermediate) / 2**10
    kept = {"none": experts + _DENSE_KIB[cell.compile], "selective": experts, "full": 0.0}
    return _INPUT_AND_ROUTING_KIB + kept[cell.recompute]


def _loss(cell: Cell) -> float:
    """One chunk of logits, the head with its gradient in bf16, that gradient's sum in fp32, the hidden states'."""
    head = cell.widths.vocab * cell.widths.hidden
    logits = min(cell.tokens, _CHUNK) * cell.widths.vocab
    return 2 * logits + (2 + 2 + 4) * head + 2 * cell.tokens * cell.widths.hidden


def _layer_at_work(cell: Cell) -> float:
    """Weights of the experts in bf16 (gathered one layer ahead if FSDP shards them), and their rows in and out."""
    sizes = cell.widths
    layers = 2 if cell.ranks > cell.ep else 1
    weights = layers * 2 * costs.expert_parameters(sizes) / cell.ep
    return weights + cell.tokens * sizes.top_k * 2 * (2 * sizes.hidden + sizes.moe_intermediate)
