"""What ``lightning-ep plan`` prints: one screen, the best layout first, and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from lightning_ep.planner import traffic
from lightning_ep.planner.candidates import Estimate, Request, best, fits
from lightning_ep.planner.counts import active_parameters, num_parameters, rows_sent
from lightning_ep.planner.step_time import hidden_of_expert_fsdp, host_ms

_MIB = 2**20


def heading(request: Request) -> Iterator[str]:
    """What the plan is of."""
    model, device = request.model, request.device
    total, active = (count(model.widths, model.layers) / 1e9 for count in (num_parameters, active_parameters))
    nodes = max(1, request.ranks // request.node)
    source = model.source.partition(";")[0]
    yield f"{model.name}: {total:,.2f} B parameters, {active:.2f} B active, {model.layers} layers ({source})"
    yield (
        f"{request.ranks} x {device.name}, {nodes} node{'s' * (nodes > 1)}"
        + (f", network {device.network * 8 / 1e9:,.0f} Gb/s per GPU" if nodes > 1 else "")
        + f"; {request.planned_gib:.0f} of {device.memory_gib:.0f} GiB are planned"
    )
    what = f"LoRA of rank {request.lora_rank}, frozen bf16 weights" if request.lora_rank else "all weights"
    optimizer = "AdamW, moments in bf16" if request.stochastic_rounding else "AdamW"
    step = f", {request.tokens_per_step:,} per step" if request.tokens_per_step else ""
    yield (
        f"{request.sequence:,} tokens per sequence{step}; {request.precision}, {optimizer}, {what}, compiled; "
        f"the busiest rank gets {request.skew:g} x the mean"
    )
    if model.positions and request.sequence > model.positions:
        yield f"NOTE: the model was made for {model.positions:,} tokens."
    if model.note:
        yield f"NOTE: {model.note}"


def table(found: list[Estimate], chosen: Estimate, rows: int, tokens: float) -> Iterator[str]:
    """The best layouts, one a line; ``tokens`` is how many the last column is for."""
    yield (
        "    ep fsdp repl tp cp  recompute  micro x accumulate  tokens/s per GPU    MFU    GiB  "
        f"{tokens / 1e9:g} B tokens"
    )
    shown = found[:rows] if chosen in found[:rows] else [*found[: rows - 1], chosen]
    for one in shown:
        case = one.case
        batches = f"{case.batch} x {case.accumulate}"
        mark = "->" if one is chosen else "  "
        yield (
            f"{mark}{case.ep:>4} {case.fsdp:>4} {case.replicate:>4} {case.tp:>2} {case.cp:>2}  "
            f"{case.recompute:<9}  {batches:>18}  {one.rate:>16,.0f}  {one.mfu:>4.0%}  {one.gib:>5.1f}  "
            f"{_duration(tokens / (one.rate * case.ranks)):>11}"
        )
    if len(found) > len(shown):
        yield f"  and {len(found) - len(shown)} slower layouts that fit"


def reasons(request: Request, found: list[Estimate], chosen: Estimate) -> Iterator[str]:
    """Why it is chosen, what it takes, and what the alternatives would cost."""
    yield _why(found, chosen)
    parts = ", ".join(f"{name} {size:.1f}" for name, size in chosen.memory.items() if size >= 0.05)
    left = f"{request.limit_gib - chosen.gib:.1f} left of {request.limit_gib:.0f}"
    yield f"Memory per GPU, GiB: {parts or 'less than 0.05 of each'}; {left}."
    work = sum(chosen.parts.values())
    large = {name: ms for name, ms in chosen.parts.items() if ms >= 0.01 * work}
    shares = ", ".join(f"{name} {ms / work:.0%}" for name, ms in sorted(large.items(), key=lambda item: -item[1]))
    host = host_ms(chosen.case) or 0.0
    waits = f" The host launches for {host:,.0f} ms: it sets the pace." if host > work else ""
    yield f"A step of {chosen.case.tokens_per_step:,} tokens takes a GPU {work:,.0f} ms: {shares}.{waits}"
    yield _sent(request, chosen)
    if request.ranks > request.node:
        yield from _flat(request, found)
    yield from _without(found)


def unmeasured(request: Request, chosen: Estimate) -> str:
    """What of an estimate nobody has measured."""
    case = chosen.case
    named = {
        f"{request.device.name}": request.device.name not in ("H100", "H200"),
        "more than 2 GPUs": case.ranks > 2,
        "the network": case.ranks > case.node,
        "these widths": (request.model.widths.hidden, request.model.widths.moe_intermediate) != (2048, 768),
        "tp": case.tp > 1,
        "accumulation": case.accumulate > 1,
        "replicate": case.replicate > 1,
        "cp > 2": case.cp > 2,
        "linear attention": request.model.widths.linear is not None,
        "LoRA beyond 2 GPUs": case.lora_rank > 0 and case.ranks > 2,
    }
    missing = ", ".join(name for name, is_so in named.items() if is_so)
    return (
        "All figures are estimates, by times measured on 1 and 2 H200 at Qwen3-30B-A3B's width "
        f"(docs/choose/planning.md). {f'Never measured: {missing}' if missing else 'Cases of this kind were measured'}."
    )


def _why(found: list[Estimate], chosen: Estimate) -> str:
    if len(found) == 1:
        return "-> It is the only layout that fits."
    if chosen is not found[0]:
        return (
            f"-> is chosen: by {1 - chosen.rate / found[0].rate:.1%} slower than the fastest, which is less than these "
            "estimates can tell, and simpler: with less of replicate, tp, cp and EP across nodes."
        )
    return f"-> is chosen: the fastest that fits, {chosen.rate / found[1].rate:.2f} times the next layout."


def _sent(request: Request, chosen: Estimate) -> str:
    """Bytes per layer, and what of them hides."""
    case, device = chosen.case, request.device
    hop, gather = traffic.exchange(case), traffic.expert_gather(case)
    hops = 5 if case.recompute == "full" else 4
    said = []
    if case.ep > 1:
        said.append(
            f"{hops} exchanges of tokens, {_bytes(hop)} each, {hops * hop.ms(device):.2f} ms, of which nothing hides"
        )
    if case.fsdp > 1:
        times = 2 if case.lora_rank else 4
        hidden = hidden_of_expert_fsdp(case, device)
        reduced = "" if case.lora_rank else " and their gradients reduced"
        said.append(
            f"experts gathered twice{reduced}, {_bytes(gather * times)}, "
            f"{times * gather.ms(device):.2f} ms, of which {hidden:.0%} hides under arithmetic that it slows"
        )
    if case.cp > 1:
        exchange = traffic.sequence_exchange(case)
        said.append(
            f"queries, keys and values, {_bytes(exchange * 2)}, {2 * exchange.ms(device):.2f} ms, nothing hides"
        )
    if case.tp > 1:
        exchange = traffic.tensor_exchange(case)
        said.append(f"activations for tp, {_bytes(exchange * 2)}, {2 * exchange.ms(device):.2f} ms, nothing hides")
    return f"A GPU sends per layer and micro-batch: {'; '.join(said) or 'no tokens, and shards of all but experts'}."


def _flat(request: Request, found: list[Estimate]) -> Iterator[str]:
    """EP across nodes beside EP inside a node."""
    flat = best(one for one in found if one.crosses)
    inside = best(one for one in found if one.case.ep > 1 and not one.crosses)
    if flat is None or inside is None:
        missing = "EP across nodes" if flat is None else "EP inside a node"
        yield f"Across nodes or inside: no layout with {missing} fits."
        return
    case, widths = flat.case, request.model.widths
    away = traffic.exchange(case)
    line = (
        f"Across nodes or inside: the best with ep={case.ep} across nodes makes {flat.rate:,.0f} tokens/s per GPU, the "
        f"best inside a node (ep={inside.case.ep}) {inside.rate:,.0f}. Flat, each of 4 exchanges per layer takes "
        f"{away.network / _MIB:,.0f} MiB per GPU over the network, {away.ms(request.device):.2f} ms that nothing hides"
    )
    if inside.case.fsdp > 1:
        gathered = (traffic.expert_gather(inside.case) * 4).network
        share = (case.ep - math.gcd(case.ep, case.node)) / (case.ep - 1)
        row = rows_sent(widths, case.ep) * share * 2 * widths.hidden * case.skew
        line += (
            f"; inside, gathers and gradients of experts take {gathered / _MIB:,.0f} MiB per layer, whatever the "
            f"tokens. Both send as much at {gathered / (4 * row):,.0f} tokens per GPU and micro-batch"
        )
    yield line + "."


def _without(found: list[Estimate]) -> Iterator[str]:
    """Whether EP is worth it."""
    without, with_ep = best(one for one in found if one.case.ep == 1), best(one for one in found if one.case.ep > 1)
    if with_ep is None:
        yield "Is EP worth it: no layout with it exists that fits."
    elif without is None:
        yield "Is EP worth it: without it (ep=1, FSDP2 alone) nothing fits."
    else:
        yield (
            f"Is EP worth it: FSDP2 alone (ep=1) makes {without.rate:,.0f} tokens/s per GPU at best, "
            f"EP (ep={with_ep.case.ep}) {with_ep.rate:,.0f}: {with_ep.rate / without.rate:.2f} times as many"
            + (", less than these estimates can tell apart." if abs(with_ep.rate / without.rate - 1) < 0.1 else ".")
        )


def nothing_fits(request: Request, least: Estimate) -> str:
    """What is missing where no layout fits, and what would fit."""
    case = least.case
    more = (request.ranks * 2**doublings for doublings in range(1, 7))
    enough = next((ranks for ranks in more if fits(_with_ranks(request, ranks))), None)
    changes = [f"--gpus {enough}"] if enough else []
    if not request.lora_rank and fits(dataclasses.replace(request, lora_rank=16)):
        changes.append("--lora_rank 16")
    shorter = request.sequence // 2
    if shorter and fits(dataclasses.replace(request, sequence=shorter)):
        changes.append(f"--sequence_length {shorter}")
    return (
        f"nothing fits: the least is {least.gib:.1f} GiB per GPU, and {request.planned_gib:.1f} are planned "
        f"(ep={case.ep}, fsdp={case.fsdp}, replicate={case.replicate}, tp={case.tp}, cp={case.cp}, "
        f"{case.recompute} recompute). "
        + (f"What would fit: {', or '.join(changes)}." if changes else "Neither more GPUs nor LoRA would fit.")
    )


def _with_ranks(request: Request, ranks: int) -> Request:
    tokens = request.tokens_per_step
    return dataclasses.replace(request, ranks=ranks, tokens_per_step=tokens and tokens * ranks // request.ranks)


def _bytes(sent: traffic.Traffic) -> str:
    """Bytes by where they travel."""
    named = {"NVLink": sent.link, "the network": sent.network}
    return " and ".join(f"{size / _MIB:,.1f} MiB over {name}" for name, size in named.items() if size) or "0 MiB"


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.1f} h" if hours < 72 else f"{hours / 24:,.1f} days"
