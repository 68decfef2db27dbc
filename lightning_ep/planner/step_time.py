"""How long a step takes: the time of parts that were measured, scaled to the case, beside what the host needs.

All times are milliseconds of one rank and optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ep.planner import traffic
from lightning_ep.planner.case import Case
from lightning_ep.planner.counts import expert_parameters, local_adapters, local_parameters, model_flops
from lightning_ep.planner.devices import GPUS, Device
from lightning_ep.planner.widths import QWEN3_30B_A3B

# The case of two H200 at which the parts were measured, forward and backward: one layer of it, and its head.
_MEASURED = Case(QWEN3_30B_A3B, layers=1, batch=4, sequence=4096, ranks=2, ep=2)
_MEASURED_ON = GPUS["H200"]
_COMPUTE_MS = {"attention projections": 2.9, "attention core": 4.0, "expert GEMMs": 6.0}
_MEMORY_MS = {"glue": 1.7, "norms and rotary": 1.0}
_HEAD_AND_LOSS_MS = 55.0
_HOPS = 4  # dispatch and combine, forward and backward
# Passes over weights reach this share of the bandwidth (AdamW, norms and casts on an H200 and an H100: 0.8 to 0.9).
_OF_BANDWIDTH = 0.85

# The forward's share of forward and backward: one of three GEMMs and passes, two of seven products of attention.
_GEMMS = ("attention projections", "dense MLPs", "expert GEMMs")
_FORWARD = dict.fromkeys((*_GEMMS, *_MEMORY_MS), 1 / 3) | {"attention core": 2 / 7}
# What backward does again. `selective` leaves out routers and experts; `full` repeats the up projection, two thirds of
# the experts' forward, and the permutation before it, one of the eight or so passes over pairs that glue is.
_DENSE = ("attention projections", "attention core", "dense MLPs", "norms and rotary")
_AGAIN: dict[str, dict[str, float]] = {"none": {}, "selective": {name: _FORWARD[name] for name in _DENSE}}
_AGAIN["full"] = {**_AGAIN["selective"], "expert GEMMs": _FORWARD["expert GEMMs"] * 2 / 3, "glue": 1 / 8}

# The host's, per step and per layer of a compiled model whose layers FSDP gathers four at a time: beside one H200, 16
# cores launched the 48 layers of a rehearsed rank of eight in 312 ms. Recompute as it was before layers were grouped.
_HOST_STEP_MS = 25.0
_HOST_LAYER_MS = {"none": 6.0, "selective": 8.0, "full": 8.0}
# NCCL's exchanges, which a rehearsal does not make, and waiting for their other end: two H200 took 159 ms for a step of
# 12 layers and 1 x 4096 tokens, 28 of them for the optimizer.
_HOST_EXCHANGE_MS = 2.2
# What adapters launch beside that: 48 layers and 1 x 4096 tokens, which the host alone paced, took 533 ms.
_HOST_LORA_MS = 2.5
# Where the host and the GPU take about as long, each waits for the other now and then: the step takes the norm of both,
# of a power that gives what two H200 took for 12 layers and 2 x 4096 tokens at ep=2, 192 ms, of 165 and 152.
_TOGETHER = 4

# The low-rank products of experts, per layer and 16,384 tokens: one H200 worked 893 ms for adapters of all (r=8) and
# 837 for those of attention, 48 layers, full recompute. They pass over pairs of tokens and experts as glue does.
_EXPERT_ADAPTERS_MS = 1.2

# Share of its own time by which a collective that arithmetic hides makes that arithmetic longer. Two H200 at ep=1, 12
# layers and 4 x 4096 tokens: 144 ms of NCCL were hidden, and GEMMs and attention took 38 ms longer than at ep=2.
_DELAY = 0.26
# Bytes per parameter that FSDP's copies of experts cost at full bandwidth: before and behind two gathers and a
# reduction, about half of them because experts are sharded along their second dimension. The same two runs: a step of
# 413 ms at ep=1 and of 311 at ep=2, 46 of them exchanges, leave 110 beside the 38, 9.1 per layer of 604 M parameters.
# (A rehearsed rank of eight, whose copies met no transfers, took 6.1.)
_EXPERT_COPY_BYTES = 72


def tokens_per_second(case: Case, device: Device) -> float:
    """Tokens per second and GPU: by the GPU's work and the host's, of which the longer one hides most of the other.

    With an exchange of tokens the host waits for counts in the first layer until the optimizer step before is done.
    """
    return rate(case, step_ms(case, device))


def rate(case: Case, parts: dict[str, float]) -> float:
    """`tokens_per_second` of a step whose parts are known."""
    waits = parts["AdamW"] + parts["norm"] if case.ep > 1 else 0.0
    gpu, host = sum(parts.values()), (host_ms(case) or 0.0) + waits
    return case.tokens * case.accumulate / (gpu**_TOGETHER + host**_TOGETHER) ** (1 / _TOGETHER) * 1e3


def step_ms(case: Case, device: Device) -> dict[str, float]:
    """What a GPU works in a step, by part.

    Compute scales with FLOPs, what is bound by memory with bytes and the device's bandwidth, exchanges with bytes, as
    if nothing hid them. FSDP is what the layers' arithmetic does not hide of it, what it delays, and its copies. Fixed
    costs of small shapes are not known here, nor kernels of other widths than those that were measured.
    """
    layers = _layer_parts(case, device)
    again = _again_ms(case, layers)
    parts = {name: layers[name] * _FORWARD[name] + ms for name, ms in _backward(case, layers).items()}
    parts |= _exchanges(case, device)
    parts["recompute"] = again + parts.pop("exchanges again")
    if case.lora_rank and case.lora_experts:
        parts["adapters of experts"] = _EXPERT_ADAPTERS_MS * layers["glue"] / _MEMORY_MS["glue"]
    head = case.tokens * case.widths.hidden * case.widths.vocab / (_MEASURED.tokens * _head(_MEASURED))
    parts["head and loss"] = _HEAD_AND_LOSS_MS * head * _slower(device) * (2 / 3 if case.lora_rank else 1)
    parts = {name: case.accumulate * ms for name, ms in parts.items()}
    parts |= _fsdp_ms(case, device, *_arithmetic_ms(case, device))
    for name, moved in _weight_bytes_moved(case).items():
        parts[name] = moved / (_OF_BANDWIDTH * device.bandwidth) * 1e3
    return parts


def _arithmetic_ms(case: Case, device: Device) -> tuple[float, float]:
    """What the layers compute in forward, and in backward with what it does again; of one micro-batch."""
    layers = _layer_parts(case, device)
    forward = sum(layers[name] * part for name, part in _FORWARD.items())
    return forward, sum(_backward(case, layers).values()) + _again_ms(case, layers)


def _again_ms(case: Case, layers: dict[str, float]) -> float:
    return sum(layers[name] * part for name, part in _AGAIN[case.recompute].items())


def host_ms(case: Case) -> float | None:
    """What the host needs to launch a step; None without compilation, where that was not measured."""
    if not case.compile:
        return None
    exchanges = _HOST_EXCHANGE_MS * case.widths.expert_layers(case.layers) if case.ep > 1 else 0.0
    layer = _HOST_LAYER_MS[case.recompute] + (_HOST_LORA_MS if case.lora_rank else 0.0)
    return _HOST_STEP_MS + case.accumulate * (case.layers * layer + exchanges)


def _slower(device: Device) -> float:
    """How much longer arithmetic takes than where it was measured."""
    return _MEASURED_ON.flops / device.flops


def _head(case: Case) -> int:
    return case.widths.hidden * case.widths.vocab


def _layer_parts(case: Case, device: Device) -> dict[str, float]:
    """Forward and backward of all layers and one micro-batch, where all weights are trained."""
    work, measured = _work(case), _work(_MEASURED)
    found = {name: ms * work[name] / measured[name] * _slower(device) for name, ms in _COMPUTE_MS.items()}
    dense_rate = _COMPUTE_MS["attention projections"] / measured["attention projections"]
    found["dense MLPs"] = work["dense MLPs"] * dense_rate * _slower(device)
    bandwidth = _MEASURED_ON.bandwidth / device.bandwidth
    return found | {name: ms * work[name] / measured[name] * bandwidth for name, ms in _MEMORY_MS.items()}


def _backward(case: Case, layers: dict[str, float]) -> dict[str, float]:
    """The backward's part of it: frozen weights have no gradient, which is one of the two GEMMs."""
    halved = _GEMMS if case.lora_rank else ()
    return {name: ms * (1 - _FORWARD[name]) * (0.5 if name in halved else 1) for name, ms in layers.items()}


def _work(case: Case) -> dict[str, float]:
    """What the time of each part is proportional to, in units of the part's own."""
    widths = case.widths
    experts = widths.expert_layers(case.layers) * case.skew  # others wait for the busiest rank
    each_token = model_flops(widths, case.layers, case.sequence)
    each_token["expert GEMMs"] *= case.skew
    each_token["glue"] = experts * widths.top_k * (widths.hidden + widths.moe_intermediate)
    each_token["norms and rotary"] = case.layers * widths.hidden
    return {name: case.tokens * amount for name, amount in each_token.items()}


def _exchanges(case: Case, device: Device) -> dict[str, float]:
    """Of one micro-batch: what the host of no arithmetic hides. Recompute repeats those of forward that it needs."""
    widths = case.widths
    experts, softmax = widths.expert_layers(case.layers), case.layers - widths.linear_layers(case.layers)
    hop = experts * traffic.exchange(case).ms(device)
    sequences = softmax * traffic.sequence_exchange(case).ms(device)
    mlps = case.layers - experts + (experts if widths.shared_intermediate else 0)
    tensors = (case.layers + mlps) * traffic.tensor_exchange(case).ms(device)
    again = (hop if case.recompute == "full" else 0.0) + (sequences + tensors if case.recompute != "none" else 0.0)
    return {
        "dispatch and combine": _HOPS * hop,
        "exchanges of sequences": 2 * sequences,
        "exchanges of tensor parallelism": 2 * tensors,
        "exchanges again": again,
    }


@dataclass(frozen=True)
class _Exposed:
    """Milliseconds of a step that collectives of FSDP take beside all arithmetic."""

    experts: float
    rest: float
    copies: float


def _exposed(case: Case, device: Device, forward_ms: float, backward_ms: float) -> _Exposed:
    """What the arithmetic of a micro-batch does not cover.

    Everything is gathered in bf16 in forward and in backward, and gradients are reduced in fp32: those of experts with
    every micro-batch, others, and the sum over copies of the model, with the last.
    """
    reduced = 0 if case.lora_rank else 2  # fp32: twice the bytes
    experts, others = _gathers_ms(case, device)

    def left(covered: float, *collectives: float) -> list[float]:
        """Of each of several that arithmetic covers one after the other."""
        found = []
        for ms in collectives:
            found.append(max(0.0, ms - covered))
            covered = max(0.0, covered - ms)
        return found

    forward = left(forward_ms, experts, others)
    backward = left(backward_ms, (1 + reduced) * experts, others)
    copies = traffic.copies_sum(case).ms(device)
    last = left(backward_ms, (1 + reduced) * experts, (1 + reduced) * others, copies)
    times = case.accumulate
    return _Exposed(
        times * (forward[0] + backward[0]), times * forward[1] + (times - 1) * backward[1] + last[1], last[2]
    )


def _gathers_ms(case: Case, device: Device) -> tuple[float, float]:
    """One gather of the experts of all layers, and one of everything else."""
    experts = case.widths.expert_layers(case.layers) * traffic.expert_gather(case).ms(device)
    return experts, traffic.dense_gather(case).ms(device)


def _expert_fsdp_total_ms(case: Case, device: Device) -> float:
    """All gathers and reductions of experts of a step by themselves."""
    return case.accumulate * (2 if case.lora_rank else 4) * _gathers_ms(case, device)[0]


def hidden_of_expert_fsdp(case: Case, device: Device) -> float:
    """Share of the gathers and reductions of experts that arithmetic covers."""
    total = _expert_fsdp_total_ms(case, device)
    return 1 - _exposed(case, device, *_arithmetic_ms(case, device)).experts / total if total else 1.0


def _fsdp_ms(case: Case, device: Device, forward_ms: float, backward_ms: float) -> dict[str, float]:
    """Of a step: collectives that layers do not cover or that delay them, and FSDP's copies of experts."""
    exposed = _exposed(case, device, forward_ms, backward_ms)
    hidden = _expert_fsdp_total_ms(case, device) - exposed.experts
    moved = case.widths.expert_layers(case.layers) * expert_parameters(case.widths) / case.ep * _EXPERT_COPY_BYTES
    moved *= case.accumulate * (0.5 if case.lora_rank else 1)  # copies of gathers alone
    return {
        "FSDP of experts": exposed.experts + _DELAY * hidden,
        "FSDP's copies of experts": moved / device.bandwidth * 1e3 if case.managed_experts else 0.0,
        "FSDP of the rest": exposed.rest,
        "sum over copies of the model": exposed.copies,
    }


def _weight_bytes_moved(case: Case) -> dict[str, float]:
    """What the passes over a rank's weights read and write in a step. Experts are cast twice if copies do not fit."""
    experts, others = local_parameters(case)
    each, gradient = case.weight_bytes, case.expert_gradient_bytes
    state = 2 * each + 4 * case.moment_bytes  # weight and moments, in and out
    if case.lora_rank:
        experts, others = 0.0, local_adapters(case)
    moved = {
        "AdamW": experts * (state + gradient) + others * (state + each),
        "norm": experts * gradient + others * each,
    }
    if case.precision == "bf16-mixed":
        moved["casts"] = case.accumulate * (4 + 2) * ((1 if case.managed_experts else 2) * experts + others)
    return moved
