"""How long a step takes: the time of parts that were measured, scaled to the case, beside what the host needs.

All times are milliseconds of one rank and step.
"""

from __future__ import annotations

from lightning_ep.planner.case import QWEN3_30B_A3B, Case
from lightning_ep.planner.counts import expert_parameters, layer_flops, local_parameters, rows_sent
from lightning_ep.planner.devices import Device

# The case of two H200 at which the parts were measured, forward and backward: one layer of it, and its head.
_MEASURED = Case(QWEN3_30B_A3B, layers=1, batch=4, sequence=4096, ranks=2, ep=2)
_MEASURED_BANDWIDTH = 4.8e12  # bytes/s, of an H200's memory
_COMPUTE_MS = {"attention projections": 2.9, "attention core": 4.0, "expert GEMMs": 6.0}
_MEMORY_MS = {"glue": 1.7, "norms and rotary": 1.0}
_HEAD_AND_LOSS_MS = 55.0
_EXCHANGE_MS, _HOPS = 0.8, 4  # dispatch and combine, forward and backward
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


def tokens_per_second(case: Case, device: Device) -> float:
    """Tokens per second and GPU: by the GPU's work, or by the host's where that takes longer.

    With an exchange of tokens the host waits for counts in the first layer until the optimizer step before is done.
    """
    parts = step_ms(case, device)
    waits = parts["AdamW"] + parts["norm"] if case.ep > 1 else 0.0
    return case.tokens / max(sum(parts.values()), (host_ms(case) or 0.0) + waits) * 1e3


def step_ms(case: Case, device: Device) -> dict[str, float]:
    """What a GPU works in a step, by part.

    Compute scales with FLOPs, what is bound by memory with bytes and the device's bandwidth, exchanges with rows, as if
    nothing hid them. FSDP of experts is what the layer's arithmetic does not hide of it, and its copies. Skew, fixed
    costs of small shapes, and collectives that slow the arithmetic that hides them are not known here.
    """
    slower = _MEASURED_BANDWIDTH / device.bandwidth
    work, measured = _work(case), _work(_MEASURED)
    layer = {name: ms * work[name] / measured[name] for name, ms in _COMPUTE_MS.items()}
    layer |= {name: ms * work[name] / measured[name] * slower for name, ms in _MEMORY_MS.items()}
    exchange = _HOPS * _hop_bytes(case) / _link() * 1e3
    again = sum(layer[name] * part for name, part in _AGAIN[case.recompute].items())
    forward = sum(layer[name] * part for name, part in _FORWARD.items())
    backward = sum(layer.values()) - forward + again
    parts = {name: case.layers * ms for name, ms in layer.items()}
    parts["dispatch and combine"] = case.layers * exchange
    parts["recompute"] = case.layers * (again + (exchange / _HOPS if case.recompute == "full" else 0.0))
    parts["FSDP of experts"] = case.layers * _expert_fsdp_ms(case, device, forward, backward)
    parts["head and loss"] = _HEAD_AND_LOSS_MS * work["head"] / measured["head"]
    for name, moved in _weight_bytes_moved(case).items():
        parts[name] = moved / (_OF_BANDWIDTH * device.bandwidth) * 1e3
    return parts


def host_ms(case: Case) -> float | None:
    """What the host needs to launch a step; None without compilation, where that was not measured."""
    if not case.compile:
        return None
    exchange = _HOST_EXCHANGE_MS if case.ep > 1 else 0.0
    return _HOST_STEP_MS + case.layers * (_HOST_LAYER_MS[case.recompute] + exchange)


def _work(case: Case) -> dict[str, float]:
    """What the time of each part is proportional to, in units of the part's own."""
    widths = case.widths
    flops = layer_flops(widths, case.sequence)
    each_token = {
        **{name: flops[name] for name in _COMPUTE_MS},
        "glue": widths.top_k * (widths.hidden + widths.moe_intermediate),
        "norms and rotary": widths.hidden,
        "head": widths.hidden * widths.vocab,
    }
    return {name: case.tokens * amount for name, amount in each_token.items()}


def _hop_bytes(case: Case) -> float:
    """What a rank sends in one of the exchanges of a layer: rows in bf16."""
    return case.tokens * rows_sent(case.widths, case.ep) * 2 * case.widths.hidden


def _link() -> float:
    """Bytes per second and direction of the links between GPUs, as fast as the measured exchange: 335 GB/s."""
    return _HOPS * _hop_bytes(_MEASURED) / (_EXCHANGE_MS * 1e-3)


def _expert_fsdp_ms(case: Case, device: Device, forward_ms: float, backward_ms: float) -> float:
    """Per layer: FSDP's copies around its collectives, and what of these a layer's arithmetic does not cover.

    Experts are gathered in bf16 in forward and in backward, one layer ahead, and their gradients reduced in fp32.
    """
    if case.fsdp == 1:
        return 0.0
    params = expert_parameters(case.widths) / case.ep
    gather = (case.fsdp - 1) / case.fsdp * 2 * params / _link() * 1e3
    exposed = max(0.0, gather - forward_ms) + max(0.0, 3 * gather - backward_ms)  # fp32: twice the bytes
    return exposed + params * _EXPERT_COPY_BYTES / device.bandwidth * 1e3


def _weight_bytes_moved(case: Case) -> dict[str, float]:
    """What the passes over a rank's weights read and write in a step. Experts are cast twice if copies do not fit."""
    experts, others = local_parameters(case)
    each, gradient = case.weight_bytes, case.expert_gradient_bytes
    moved = {
        "AdamW": experts * (6 * each + gradient) + others * 7 * each,  # weight and moments in and out, gradient in
        "norm": experts * gradient + others * each,
    }
    if case.precision == "bf16-mixed":
        moved["casts"] = (4 + 2) * ((2 if case.narrow_gradients else 1) * experts + others)
    return moved
