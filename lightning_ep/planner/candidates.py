"""Every layout that exists for a model on so many GPUs, what it would cost, and which one to take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lightning_ep.layout import ParallelLayout
from lightning_ep.planner.case import Case
from lightning_ep.planner.counts import flops_per_token
from lightning_ep.planner.devices import Device, allocatable_gib
from lightning_ep.planner.families import Model
from lightning_ep.planner.memory import memory_gib
from lightning_ep.planner.step_time import rate, step_ms

# Tokens of a rank in a micro-batch, beyond which a larger one gains nothing where nothing asks for it.
_ENOUGH_TOKENS = 32_768
# Of what tensors may take, the rest is kept for what estimates miss: up to 4 % (docs/choose/planning.md).
_FILLED = 0.95
# Estimates that differ by less say nothing of which is faster (docs/choose/planning.md): the simpler layout is taken.
_CLOSE = 0.1


@dataclass(frozen=True)
class Request:
    """What a plan is asked for.

    Attributes:
        model: The model.
        device: The GPUs.
        ranks: How many.
        node: GPUs per node.
        sequence: Tokens per sequence.
        tokens_per_step: Of all ranks in an optimizer step; None for what one micro-batch of every rank has.
        precision: ``bf16-mixed`` or ``bf16-true``.
        lora_rank: Of adapters; 0 trains all weights.
        lora_experts: Whether adapters are of attention and experts, or of attention alone.
        skew: Rows of the busiest rank over the mean of its EP group.
        stochastic_rounding: Whether moments are bf16 beside fp32 weights.

    Raises:
        ValueError: If the sizes do not divide each other.
    """

    model: Model
    device: Device
    ranks: int
    node: int = 8
    sequence: int = 4096
    tokens_per_step: int | None = None
    precision: str = "bf16-mixed"
    lora_rank: int = 0
    lora_experts: bool = True
    skew: float = 1.2
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        for name in ("ranks", "node", "sequence"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be a positive integer.")
        if self.ranks > self.node and self.ranks % self.node:
            raise ValueError(f"{self.ranks} GPUs are no whole nodes of {self.node}: all nodes must have as many.")
        if self.tokens_per_step is not None and self.tokens_per_step % self.sequence:
            nearest = max(1, round(self.tokens_per_step / self.sequence)) * self.sequence
            raise ValueError(
                f"a step of {self.tokens_per_step:,} tokens has no whole number of sequences of {self.sequence:,}; "
                f"{nearest:,} would."
            )

    @property
    def limit_gib(self) -> float:
        """What tensors of a GPU may take."""
        return allocatable_gib(self.device)

    @property
    def planned_gib(self) -> float:
        """What of it an estimate may take."""
        return _FILLED * self.limit_gib


@dataclass(frozen=True)
class Estimate:
    """What one way to train would cost.

    Attributes:
        case: The way.
        memory: GiB of a rank by what they are for.
        parts: Milliseconds of an optimizer step, by part.
        rate: Tokens per second and GPU.
        mfu: Share of the GPU's arithmetic that the model's FLOPs take.
    """

    case: Case
    memory: dict[str, float]
    parts: dict[str, float]
    rate: float
    mfu: float

    @property
    def gib(self) -> float:
        """Of a rank, in all."""
        return sum(self.memory.values())

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """``ep``, ``replicate``, ``tp``, ``cp``."""
        return self.case.ep, self.case.replicate, self.case.tp, self.case.cp

    @property
    def crosses(self) -> bool:
        """Whether tokens travel between nodes."""
        return self.case.ep > math.gcd(self.case.ep, self.case.node)


def estimate(case: Case, device: Device) -> Estimate:
    """What a case would cost."""
    parts = step_ms(case, device)
    speed = rate(case, parts)
    mfu = speed * flops_per_token(case.widths, case.layers, case.sequence) / device.flops
    return Estimate(case, memory_gib(case, allocatable_gib(device)), parts, speed, mfu)


def layouts(request: Request) -> Iterator[ParallelLayout]:
    """All that the rules of `lightning_ep.layout` and of the model allow; ``tp`` and ``cp`` stay inside a node."""
    widths, family = request.model.widths, request.model.family
    node = min(request.node, request.ranks)
    kv_heads = widths.heads if widths.latent else widths.kv_heads
    for ep in _divisors(math.gcd(request.ranks, widths.experts)):
        for replicate in _divisors(request.ranks // ep):
            for both in _divisors(math.gcd(node, request.ranks // replicate)):
                for tp in _divisors(both):
                    cp = both // tp
                    split = (widths.vocab, widths.dense_intermediate, widths.shared_intermediate)
                    fits = request.sequence % both == 0 and all(width % tp == 0 for width in split)
                    if not fits or (tp > 1 and not family.tp) or (cp > 1 and not family.cp):
                        continue
                    fsdp = request.ranks // (ep * replicate)
                    layout = ParallelLayout(request.ranks, ep, fsdp, replicate, tp, cp)
                    try:
                        layout.check_attention_heads(widths.heads, kv_heads, "attention")
                        layout.check_key_value_heads(widths.heads, kv_heads, "attention")
                    except ValueError:
                        continue
                    yield layout


def cases(request: Request, among: Iterable[ParallelLayout] | None = None) -> Iterator[Case]:
    """Every layout (of ``among``) with every recompute and micro-batch that gives the step its tokens."""
    model = request.model
    for layout in layouts(request) if among is None else among:
        for batch, accumulate in _batches(request, layout):
            base = Case(
                model.widths, model.layers, batch, request.sequence, request.ranks, layout.ep, layout.cp,
                request.precision, tp=layout.tp, replicate=layout.replicate, accumulate=accumulate, node=request.node,
                lora_rank=request.lora_rank, lora_experts=request.lora_experts,
                skew=request.skew if layout.ep > 1 else 1.0, stochastic_rounding=request.stochastic_rounding,
            )  # fmt: skip
            for recompute in ("none", "selective", "full"):
                yield dataclasses.replace(base, recompute=recompute)


def _batches(request: Request, layout: ParallelLayout) -> Iterator[tuple[int, int]]:
    """Sequences per micro-batch of a group of ranks that share it, and micro-batches per step."""
    each = request.sequence // (layout.tp * layout.cp)  # tokens of a rank
    if request.tokens_per_step is None:
        batch = 1
        while batch == 1 or batch * each <= _ENOUGH_TOKENS:
            yield batch, 1
            batch *= 2
        return
    sequences, groups = request.tokens_per_step // request.sequence, layout.data_world_size
    if sequences % groups:
        return
    for batch in _divisors(sequences // groups):
        accumulate = sequences // groups // batch
        if accumulate > 1 and request.precision == "bf16-true":
            continue  # AdamW(stochastic_rounding=True), without which bf16 weights do not learn, is refused with it
        if batch == 1 or batch * each <= _ENOUGH_TOKENS:
            yield batch, accumulate


def fitting(request: Request, among: Iterable[ParallelLayout] | None = None) -> list[Estimate]:
    """The fastest way of every layout (of ``among``) that fits into memory, best first."""
    best: dict[tuple[int, int, int, int], Estimate] = {}
    for case in cases(request, among):
        if sum(memory_gib(case, request.limit_gib).values()) <= request.planned_gib:
            found = estimate(case, request.device)
            if found.layout not in best or best[found.layout].rate < found.rate:
                best[found.layout] = found
    return sorted(best.values(), key=lambda found: -found.rate)


def fits(request: Request) -> bool:
    """Whether any layout fits into memory."""
    return any(
        sum(memory_gib(case, request.limit_gib).values()) <= request.planned_gib
        for case in cases(request)
        if case.recompute == "full"
    )


def smallest(request: Request) -> Estimate | None:
    """What needs the least memory, whether it fits or not; None if no layout gives the step its tokens."""
    found = min(cases(request), key=lambda case: sum(memory_gib(case, request.limit_gib).values()), default=None)
    return None if found is None else estimate(found, request.device)


def better(now: Estimate, request: Request) -> Estimate | None:
    """What to take in place of what a run does: faster by more than estimates can tell, or it would not fit.

    With as many tokens per step, and ``tp`` and ``replicate`` as they are: both have uses that no estimate knows, and
    without them thousands of GPUs are looked at in a fraction of a second.

    Args:
        now: What the run does.
        request: What it is for, with the tokens of its step.
    """
    case = now.case
    same = (layout for layout in layouts(request) if (layout.tp, layout.replicate) == (case.tp, case.replicate))
    found = fitting(request, same)
    if not found:
        return None
    chosen = choose(found)
    is_better = (1 - _CLOSE) * chosen.rate > now.rate or now.gib > request.planned_gib
    return chosen if is_better and chosen.case != case else None


def choose(found: list[Estimate]) -> Estimate:
    """The simplest of those that are about as fast as the fastest: what was never measured counts twice."""
    close = [one for one in found if one.rate >= (1 - _CLOSE) * found[0].rate]

    def complexity(one: Estimate) -> int:
        case = one.case
        return 2 * ((case.replicate > 1) + (case.tp > 1) + one.crosses) + (case.cp > 1)

    return min(close, key=lambda one: (complexity(one), -one.rate))


def best(found: Iterable[Estimate]) -> Estimate | None:
    """The fastest of some."""
    return max(found, key=lambda one: one.rate, default=None)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
