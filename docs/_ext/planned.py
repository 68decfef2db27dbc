"""Writes what the planner says into the pages of docs/choose, beside what was measured, and draws planning.svg.

python docs/_ext/planned.py

Each table stands between two comments of its page, of which the first names it. What was measured is in
benchmarks/results/measured.csv: cells on H200, compiled, of layers of Qwen3-30B-A3B.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_ep.planner import QWEN3_30B_A3B, Case, allocatable_gib, find_model, peak_gib, tokens_per_second
from lightning_ep.planner.candidates import Request, choose, fitting, layouts
from lightning_ep.planner.devices import GPUS

ROOT = Path(__file__).parents[2]
PAGES = tuple(ROOT / "docs" / "choose" / name for name in ("planning.md", "resources.md"))
PICTURE = ROOT / "docs" / "choose" / "planning.svg"
EPS = (1, 2, 4, 8, 16)
MODELS = (
    "allenai/OLMoE-1B-7B-0924",
    "deepseek-ai/DeepSeek-V2-Lite",
    "openai/gpt-oss-20b",
    "Qwen/Qwen3-30B-A3B",
    "mistralai/Mixtral-8x7B-v0.1",
    "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "zai-org/GLM-4.5-Air",
    "openai/gpt-oss-120b",
    "Qwen/Qwen3-235B-A22B",
)
MACHINES = ((1, "H100"), (1, "H200"), (2, "H200"), (4, "H100"), (8, "H100"), (8, "H200"), (16, "H100"), (64, "H100"))
METHODS: dict[str, dict[str, Any]] = {  # the settings of a case that tell them apart
    "LoRA": {"lora_rank": 8, "lora_experts": True, "precision": "bf16-mixed"},
    "16 bytes": {"lora_rank": 0, "lora_experts": True, "precision": "bf16-mixed"},
    "8 bytes": {"lora_rank": 0, "lora_experts": True, "precision": "bf16-true"},
}


def table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    names = list(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows))


# ---------------------------------------------------------------------- what was measured


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
        settings["stochastic_rounding"] = row["moments"] == "bf16"
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
        size = {("bf16-true", 2): 8, ("bf16-mixed", 2): 12}.get((case.precision, case.moment_bytes))
        short = f"{size} bytes per parameter" if size else ""
        layout = (f"ep={case.ep}", f"cp={case.cp}" if case.cp > 1 else "", again, lora, short)
        rows.append(
            (
                f"{case.ranks}, {case.layers}",
                f"{case.batch} x {case.sequence:,}" + (" on both" if case.cp > 1 else ""),
                ", ".join(filter(None, layout)),
                *(f"{rate:,}", f"{estimated_rate:,.0f}", f"{rate / estimated_rate:.2f}"),
                *(f"{gib}", f"{estimated_gib:.1f}", f"{gib / estimated_gib:.2f}"),
            )
        )
    header = ("GPUs, layers", "tokens per GPU", "layout", "tokens/s per GPU", "estimate", "of it", "GiB")
    return table((*header, "estimated GiB", "of them"), rows)


# ---------------------------------------------------------------------- whether EP is worth it


def by_ep(ranks: int, sequence: int, skew: float = 1.2) -> dict[int, float]:
    """The whole model on H100: the best rate of each ep, on layouts without tp and copies."""
    request = Request(find_model("Qwen/Qwen3-30B-A3B"), GPUS["H100"], ranks, sequence=sequence, skew=skew)
    among = [layout for layout in layouts(request) if layout.tp == layout.replicate == 1]
    best = {one.case.ep: one.rate for one in reversed(fitting(request, among))}  # of an ep the fastest comes last
    return dict(sorted(best.items()))


def question() -> str:
    """Whether EP is worth it, and across nodes: the best of every ep, by GPUs and tokens."""
    rows = []
    for ranks in (8, 16):
        for sequence in (4096, 32_768):
            rates = by_ep(ranks, sequence)
            found = [f"{rates[ep]:,.0f}" if ep in rates else "" for ep in EPS]
            rows.append((f"{ranks}, {sequence:,}", *found))
    return table(("GPUs, tokens per sequence", *(f"ep={ep}" for ep in EPS)), rows)


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
    return table(header, [(name, rate, f"{mine:,.0f} (`ep={ep}`)") for name, rate, ep, mine in rows])


# ---------------------------------------------------------------------- what fits where


@functools.cache
def measured_whole() -> dict[tuple[str, int, str], tuple[int, float]]:
    """Tokens/s per GPU and GiB of all of Qwen3-30B-A3B, by method, GPUs and their kind.

    Of several batch sizes it is the last in measured.csv, that of a recipe. A GPU of 80 GB is an H200 whose allocator
    was limited to 76 GiB.
    """
    return {
        (method, one.case.ranks, "H100" if one.cap_gib else "H200"): (one.rate, one.gib)
        for one in measured()
        for method, settings in METHODS.items()
        if one.case.layers == 48 and one.case == dataclasses.replace(one.case, **settings)
    }


def cell(method: str, model: str, ranks: int, gpu: str) -> str:
    """Tokens/s per GPU and GiB of the layout that `lightning-ep plan` takes; empty where none fits."""
    if model == "Qwen/Qwen3-30B-A3B" and (method, ranks, gpu) in measured_whole():
        rate, gib = measured_whole()[method, ranks, gpu]
        return f"**{rate:,}** ({gib:.0f})"
    found = fitting(Request(find_model(model), GPUS[gpu], ranks, **METHODS[method]))
    return f"{choose(found).rate:,.0f} ({choose(found).gib:.0f})" if found else ""


def resources(method: str) -> str:
    """A row for every model, a column for every machine."""
    header = ("", *(f"{ranks} x {gpu}" for ranks, gpu in MACHINES))
    return table(header, [(m.rpartition("/")[2], *(cell(method, m, *where) for where in MACHINES)) for m in MODELS])


# ---------------------------------------------------------------------- the picture


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


def description() -> str:
    """All numbers of the picture."""
    return "; ".join(
        f"{title}: {name}: " + ", ".join(f"ep={ep} {rate:,.0f}" for ep, rate in rates.items())
        for title, lines in panels().items()
        for name, rates in lines.items()
    )


def draw() -> None:
    """Draws the picture, which says in its description what it shows."""
    import matplotlib.pyplot as plt

    plt.rc("svg", fonttype="none", hashsalt="benchmarks")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (title, lines) in zip(axes, panels().items(), strict=True):
        for name, rates in lines.items():
            style = "o-" if name.endswith("estimated") else "s"
            axis.plot([EPS.index(ep) for ep in rates], list(rates.values()), style, label=name, fillstyle="none")
        axis.set(title=title, xticks=range(len(EPS)), xticklabels=[f"ep={ep}" for ep in EPS], xlim=(-0.4, 4.4))
        axis.set_ylim(0, 1.1 * max(rate for rates in lines.values() for rate in rates.values()))
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.legend(loc="lower left", fontsize="small")
    axes[0].set_ylabel("tokens/s per GPU")
    figure.savefig(PICTURE, metadata={"Date": None, "Description": description()})


# ---------------------------------------------------------------------- the pages

TABLES: dict[str, Callable[[], str]] = {
    "question": question,
    "estimates": estimates,
    "published": published,
    **{method: functools.partial(resources, method) for method in METHODS},
}
_PLACE = re.compile(r"(<!-- planned: ([\w ]+) -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)


def shown(page: str) -> dict[str, str]:
    """The tables of a page by name."""
    return {found[2]: found[0].removeprefix(found[1]).removesuffix(found[3]) for found in _PLACE.finditer(page)}


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(_PLACE.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], path.read_text()))
    draw()
