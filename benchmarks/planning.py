"""The figures of docs/planning.md: estimates beside what was measured, and tokens/s against ep.

    python -m benchmarks.planning

It writes docs/planning.svg and prints the tables. The measured figures are those of benchmarks/results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ep.planner import QWEN3_30B_A3B, Case, allocatable_gib, find_model, peak_gib, tokens_per_second
from lightning_ep.planner.candidates import Request, fitting
from lightning_ep.planner.devices import GPUS

PICTURE = Path(__file__).parents[1] / "docs" / "planning.svg"


@dataclass(frozen=True)
class Measured:
    """A cell that was run on H200, compiled, in bf16-mixed: layers of a model, and what they did."""

    ranks: int
    layers: int
    batch: int
    sequence: int
    rate: int
    gib: float
    settings: dict[str, Any] = field(default_factory=dict)
    cap_gib: float | None = None
    model: str = "Qwen/Qwen3-30B-A3B"

    @property
    def case(self) -> Case:
        shape = (self.layers, self.batch, self.sequence, self.ranks)
        return Case(find_model(self.model).widths, *shape, **self.settings)

    @property
    def estimate(self) -> tuple[float, float]:
        """Tokens/s per GPU, and GiB."""
        gib = peak_gib(self.case, allocatable_gib(GPUS["H200"], self.cap_gib))
        return tokens_per_second(self.case, GPUS["H200"]), gib

    @property
    def what(self) -> str:
        """Its layout, what is recomputed, and what is trained."""
        case = self.case
        sizes = ", ".join(f"{name}={size}" for name in ("tp", "cp") if (size := getattr(case, name)) > 1)
        lora = f"LoRA of {'all' if case.lora_experts else 'attention'} r={case.lora_rank}" if case.lora_rank else ""
        times = f"{case.accumulate} micro-batches" if case.accumulate > 1 else ""
        again = case.recompute if case.recompute != "none" else ""
        return ", ".join(part for part in (f"ep={case.ep}", sizes, again, times, lora) if part)


# benchmarks/results: 2026-11-24-node.md (1 GPU), 2026-11-24-train.md (2 GPUs), 2026-11-29-lora.md.
MEASURED = (
    Measured(1, 6, 4, 4096, 89_847, 75.2),
    Measured(1, 6, 4, 4096, 83_596, 71.9, {"recompute": "selective"}),
    Measured(1, 6, 4, 4096, 79_502, 69.3, {"recompute": "full"}),
    Measured(1, 6, 1, 4096, 49_970, 70.2),
    Measured(1, 6, 1, 16_384, 66_954, 75.2),
    Measured(1, 6, 1, 32_768, 45_070, 70.1, {"recompute": "full"}),
    Measured(2, 12, 4, 4096, 52_739, 78.8, {"ep": 2}),
    Measured(2, 12, 4, 4096, 39_649, 78.0),
    Measured(2, 12, 4, 4096, 46_702, 65.7, {"ep": 2, "recompute": "full"}),
    Measured(2, 12, 1, 4096, 25_708, 68.3, {"ep": 2}),
    Measured(2, 12, 1, 4096, 16_285, 67.7),
    Measured(2, 12, 1, 16_384, 36_988, 79.1, {"ep": 2}),
    Measured(2, 12, 1, 65_536, 17_268, 97.3, {"ep": 2, "cp": 2}),
    Measured(2, 12, 1, 65_536, 16_497, 93.5, {"cp": 2}),
    Measured(1, 48, 4, 4096, 18_833, 63.9, {"recompute": "full", "lora_rank": 16, "lora_experts": False}, 76.0),
    Measured(1, 48, 4, 4096, 17_766, 67.5, {"recompute": "full", "lora_rank": 8}, 76.0),
    Measured(2, 48, 4, 4096, 14_969, 38.5, {"ep": 2, "recompute": "full", "lora_rank": 8}, 76.0),
    Measured(1, 48, 1, 4096, 7_691, 59.9, {"recompute": "full", "lora_rank": 16, "lora_experts": False}, 76.0),
)
# Others' figures for the whole model on H100 at 4,096 tokens: GPUs, tokens/s per GPU, whose.
PUBLISHED = ((8, 12_040, "NeMo Automodel"), (16, 13_011, "Megatron-Bridge"))


def table() -> str:
    """Estimates beside what was measured."""
    lines = [
        "| GPUs, layers | tokens per GPU | layout | tokens/s per GPU | estimate | of it | GiB | estimate | of it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in MEASURED:
        rate, gib = one.estimate
        name = "" if one.model == MEASURED[0].model else f" of {one.model.rpartition('/')[2]}"
        tokens = f"{one.batch} x {one.sequence:,}" + (" on both" if one.case.cp * one.case.tp > 1 else "")
        lines.append(
            f"| {one.ranks}, {one.layers}{name} | {tokens} | {one.what} | {one.rate:,} | {rate:,.0f} | "
            f"{one.rate / rate:.2f} | {one.gib} | {gib:.1f} | {one.gib / gib:.2f} |"
        )
    return "\n".join(lines)


def by_ep(ranks: int, sequence: int, skew: float = 1.2) -> list[tuple[int, float]]:
    """The whole model on H100: the best rate of each ep, on layouts without tp and copies."""
    found = fitting(Request(find_model(MEASURED[0].model), GPUS["H100"], ranks, sequence=sequence, skew=skew))
    best: dict[int, float] = {}
    for one in found:
        if one.case.tp == one.case.replicate == 1:
            best[one.case.ep] = max(one.rate, best.get(one.case.ep, 0.0))
    return sorted(best.items())


def published() -> str:
    """What others have published for the whole model on H100, beside estimates of this package."""
    one_node = tokens_per_second(Case(QWEN3_30B_A3B, 48, 4, 4096, 8, ep=8, recompute="full"), GPUS["H100"])
    two, long = (max(by_ep(16, sequence, 1.0), key=lambda found: found[1]) for sequence in (4096, 16_384))
    rows = (
        ("NeMo Automodel, 8 GPUs, 4,096 tokens, full recompute", "12,040", 8, one_node),
        ("Megatron-Bridge, 16 GPUs, 4,096 tokens, no recompute", "13,011", *two),
        ("transformers, 16 GPUs, 16k tokens: FSDP2; EP by all-reduce", "3,888; 3,788", *long),
    )
    lines = [
        "| published, balanced routing | tokens/s per GPU | this package, estimated without skew |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {rate} | {estimate:,.0f} (`ep={ep}`) |" for name, rate, ep, estimate in rows]
    return "\n".join(lines)


def question() -> str:
    """Whether EP is worth it, and across nodes: the best of every ep, by GPUs and tokens."""
    lines = [f"| GPUs, tokens per sequence | {' | '.join(f'ep={ep}' for ep in _EPS)} |", "|---|" + "---|" * len(_EPS)]
    for ranks in (8, 16):
        for sequence in (4096, 32_768):
            rates = dict(by_ep(ranks, sequence))
            found = " | ".join(f"{rates[ep]:,.0f}" if ep in rates else "" for ep in _EPS)
            lines.append(f"| {ranks}, {sequence:,} | {found} |")
    return "\n".join(lines)


_WIDTH, _HEIGHT, _GAP, _TOP = 250, 190, 55, 40
_EPS = (1, 2, 4, 8, 16)


def picture() -> str:
    """An SVG of three panels: estimates of the whole model at 4k and at 32k tokens, and two GPUs with what they did."""
    panels = [
        _panel(
            0,
            "48 layers, 4,096 tokens, H100",
            {f"{n} GPUs": by_ep(n, 4096) for n in (8, 16)},
            [(8, rate, f"{name}, {n} GPUs") for n, rate, name in PUBLISHED],
        ),
        _panel(1, "48 layers, 32,768 tokens, H100", {f"{n} GPUs": by_ep(n, 32_768) for n in (8, 16)}, []),
        _panel(
            2,
            "12 layers, 4 x 4,096 tokens, 2 H200",
            {"2 GPUs": _two_gpus()},
            [
                (one.case.ep, one.rate, "measured")
                for one in MEASURED
                if one.layers == 12 and one.case == Case(QWEN3_30B_A3B, 12, 4, 4096, 2, ep=one.case.ep)
            ],
        ),
    ]
    width = 3 * (_WIDTH + _GAP) + 20
    style = "text{font:11px sans-serif;fill:#333}.a{stroke:#999;fill:none}.l{fill:none;stroke-width:2}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT + _TOP + 50}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(panels) + "\n</svg>\n"
    )


def _two_gpus() -> list[tuple[int, float]]:
    cases = [Case(QWEN3_30B_A3B, 12, 4, 4096, 2, ep=ep) for ep in (1, 2)]
    return [(case.ep, tokens_per_second(case, GPUS["H200"])) for case in cases]


def _panel(
    index: int, title: str, lines: dict[str, list[tuple[int, float]]], points: list[tuple[int, float, str]]
) -> str:
    left = _GAP + index * (_WIDTH + _GAP)
    rates = [rate for line in lines.values() for _, rate in line] + [rate for _, rate, _ in points]
    top = 1.15 * max(rates)

    def at(ep: int, rate: float) -> tuple[float, float]:
        return left + _WIDTH * (_EPS.index(ep) + 0.3) / (len(_EPS) - 0.4), _TOP + _HEIGHT * (1 - rate / top)

    drawn = [f'<text x="{left}" y="{_TOP - 18}">{title}</text>']
    drawn.append(f'<path class="a" d="M{left} {_TOP}V{_TOP + _HEIGHT}H{left + _WIDTH}"/>')
    for ep in _EPS:
        drawn.append(f'<text x="{at(ep, 0)[0]:.0f}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">ep={ep}</text>')
    step = next(size for size in (1000, 2000, 5000, 10_000, 20_000) if top / size < 7)
    for label in range(0, int(top), step):
        drawn.append(f'<text x="{left - 5}" y="{at(1, label)[1] + 4:.0f}" text-anchor="end">{label:,}</text>')
    for (name, line), color in zip(lines.items(), ("#1f77b4", "#d62728"), strict=False):
        places = [at(ep, rate) for ep, rate in line]
        way = " ".join(f"{x:.0f},{y:.0f}" for x, y in places)
        drawn.append(f'<polyline class="l" stroke="{color}" points="{way}"/>')
        drawn += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{color}"/>' for x, y in places]
        below = 16 if color == "#1f77b4" else -8
        x, y = places[0]
        drawn.append(f'<text x="{x + 4:.0f}" y="{y + below:.0f}" style="fill:{color}">{name}, estimated</text>')
    for ep, marked, name in points:
        x, y = at(ep, marked)
        drawn.append(f'<rect x="{x - 4:.0f}" y="{y - 4:.0f}" width="8" height="8" fill="none" stroke="#000"/>')
        side = f'x="{x - 8:.0f}" text-anchor="end"' if ep > 4 else f'x="{x + 8:.0f}"'
        drawn.append(f'<text {side} y="{y + (4 if ep > 1 else 24):.0f}">{name}</text>')
    return "\n".join(drawn)


def main() -> None:
    """Writes the picture and prints the table."""
    PICTURE.write_text(picture())
    print(question(), table(), published(), sep="\n\n")


if __name__ == "__main__":
    main()
