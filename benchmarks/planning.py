"""The figures of docs/choose/planning.md: estimates beside what was measured, and tokens/s against ep.

    python -m benchmarks.planning

It draws docs/choose/planning.svg and prints the tables. What was measured is in benchmarks/results/measured.csv: cells
on H200, compiled, of layers of Qwen3-30B-A3B.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.records import ROOT, table
from lightning_ep.planner import QWEN3_30B_A3B, Case, allocatable_gib, find_model, peak_gib, tokens_per_second
from lightning_ep.planner.candidates import Request, fitting
from lightning_ep.planner.devices import GPUS

PICTURE = ROOT / "docs" / "choose" / "planning.svg"
_EPS = (1, 2, 4, 8, 16)


class Measured(NamedTuple):
    """A case, its tokens/s per GPU and GiB as measured, and as estimated; GiB that torch's allocator was limited to."""

    case: Case
    rate: int
    gib: float
    estimated_rate: float
    estimated_gib: float
    cap_gib: float | None


def measured() -> Iterator[Measured]:
    """The rows of measured.csv."""
    for row in csv.DictReader((ROOT / "benchmarks" / "results" / "measured.csv").open()):
        names = ("layers", "batch", "sequence", "ranks", "ep", "cp", "lora_rank")
        settings: dict[str, Any] = {name: int(row[name]) for name in names}
        settings |= {"recompute": row["recompute"], "precision": row["precision"]}
        settings["lora_experts"] = row["lora_experts"] != "no"
        case = Case(QWEN3_30B_A3B, **settings)
        cap_gib = float(row["cap_gib"]) if row["cap_gib"] else None
        estimated = tokens_per_second(case, GPUS["H200"]), peak_gib(case, allocatable_gib(GPUS["H200"], cap_gib))
        yield Measured(case, int(row["rate"]), float(row["gib"]), *estimated, cap_gib)


def estimates() -> str:
    """Estimates beside what was measured."""
    rows = []
    for case, rate, gib, estimated_rate, estimated_gib, _ in measured():
        lora = f"LoRA of {'all' if case.lora_experts else 'attention'} r={case.lora_rank}" if case.lora_rank else ""
        again = case.recompute if case.recompute != "none" else ""
        short = "8 bytes per parameter" if case.precision == "bf16-true" else ""
        layout = (f"ep={case.ep}", f"cp={case.cp}" if case.cp > 1 else "", again, lora, short)
        rows.append({
            "GPUs, layers": f"{case.ranks}, {case.layers}",
            "tokens per GPU": f"{case.batch} x {case.sequence:,}" + (" on both" if case.cp > 1 else ""),
            "layout": ", ".join(filter(None, layout)), "tokens/s per GPU": f"{rate:,}",
            "estimate": f"{estimated_rate:,.0f}", "of it": f"{rate / estimated_rate:.2f}", "GiB": f"{gib}",
            "estimated GiB": f"{estimated_gib:.1f}", "of them": f"{gib / estimated_gib:.2f}",
        })  # fmt: skip
    return table(rows)


def by_ep(ranks: int, sequence: int, skew: float = 1.2) -> dict[int, float]:
    """The whole model on H100: the best rate of each ep, on layouts without tp and copies."""
    best: dict[int, float] = {}
    model = find_model("Qwen/Qwen3-30B-A3B")
    for one in fitting(Request(model, GPUS["H100"], ranks, sequence=sequence, skew=skew)):
        if one.case.tp == one.case.replicate == 1:
            best[one.case.ep] = max(one.rate, best.get(one.case.ep, 0.0))
    return dict(sorted(best.items()))


def published() -> str:
    """What others have published for the whole model on H100, beside estimates of this package."""
    one_node = tokens_per_second(Case(QWEN3_30B_A3B, 48, 4, 4096, 8, ep=8, recompute="full"), GPUS["H100"])
    two, long = (max(by_ep(16, sequence, 1.0).items(), key=lambda found: found[1]) for sequence in (4096, 16_384))
    rows = (
        ("NeMo Automodel, 8 GPUs, 4,096 tokens, full recompute", "12,040", 8, one_node),
        ("Megatron-Bridge, 16 GPUs, 4,096 tokens, no recompute", "13,011", *two),
        ("transformers, 16 GPUs, 16k tokens: FSDP2; EP by all-reduce", "3,888; 3,788", *long),
    )
    header = ("published, balanced routing", "tokens/s per GPU", "this package, estimated without skew")
    return table(
        [dict(zip(header, (name, rate, f"{mine:,.0f} (`ep={ep}`)"), strict=True)) for name, rate, ep, mine in rows]
    )


def question() -> str:
    """Whether EP is worth it, and across nodes: the best of every ep, by GPUs and tokens."""
    rows = []
    for ranks in (8, 16):
        for sequence in (4096, 32_768):
            rates = {f"ep={ep}": f"{rate:,.0f}" for ep, rate in by_ep(ranks, sequence).items()}
            rows.append({"GPUs, tokens per sequence": f"{ranks}, {sequence:,}", **rates})
    return table(rows)


def panels() -> dict[str, dict[str, dict[int, float]]]:
    """Tokens/s per GPU by ep of the picture's lines and marks, by panel."""
    two = [Case(QWEN3_30B_A3B, 12, 4, 4096, 2, ep=ep) for ep in (1, 2)]
    return {
        "48 layers, 4,096 tokens, H100": {
            **{f"{ranks} GPUs, estimated": by_ep(ranks, 4096) for ranks in (8, 16)},
            "NeMo Automodel, 8 GPUs, published": {8: 12_040},
            "Megatron-Bridge, 16 GPUs, published": {8: 13_011},
        },
        "48 layers, 32,768 tokens, H100": {f"{n} GPUs, estimated": by_ep(n, 32_768) for n in (8, 16)},
        "12 layers, 4 x 4,096 tokens, 2 H200": {
            "2 GPUs, estimated": {case.ep: tokens_per_second(case, GPUS["H200"]) for case in two},
            "2 GPUs, measured": {one.case.ep: one.rate for one in measured() if one.case in two},
        },
    }


def draw() -> None:
    """Draws the picture, which says in its description what it shows."""
    import matplotlib.pyplot as plt

    plt.rc("svg", fonttype="none", hashsalt="benchmarks")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (title, lines) in zip(axes, panels().items(), strict=True):
        for name, rates in lines.items():
            style = "o-" if name.endswith("estimated") else "s"
            axis.plot([_EPS.index(ep) for ep in rates], list(rates.values()), style, label=name, fillstyle="none")
        axis.set(title=title, xticks=range(len(_EPS)), xticklabels=[f"ep={ep}" for ep in _EPS], xlim=(-0.4, 4.4))
        axis.set_ylim(0, 1.1 * max(rate for rates in lines.values() for rate in rates.values()))
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.legend(loc="lower left", fontsize="small")
    axes[0].set_ylabel("tokens/s per GPU")
    figure.savefig(PICTURE, metadata={"Date": None, "Description": description()})


def description() -> str:
    """All numbers of the picture."""
    return "; ".join(
        f"{title}: {name}: " + ", ".join(f"ep={ep} {rate:,.0f}" for ep, rate in rates.items())
        for title, lines in panels().items()
        for name, rates in lines.items()
    )


def main() -> None:
    """Draws the picture and prints the tables."""
    draw()
    print(question(), estimates(), published(), sep="\n\n")


if __name__ == "__main__":
    main()
