"""The tables of docs/choose/resources.md: what fits where, and how fast, by model, GPUs and method.

    python -m benchmarks.resources

It writes them into the page. What was measured at full size is set in bold, all else is estimated by the planner.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.planning import measured
from lightning_ep.planner import find_model
from lightning_ep.planner.candidates import Request, choose, fitting
from lightning_ep.planner.devices import GPUS

PAGE = Path(__file__).parents[1] / "docs" / "choose" / "resources.md"
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
ALL_WEIGHTS: dict[str, Any] = {"lora_rank": 0, "lora_experts": True, "precision": "bf16-mixed"}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA of attention and experts, r=8": {"lora_rank": 8},
    "All weights, 16 bytes per parameter": {},
    "All weights, 8 bytes per parameter": {"precision": "bf16-true"},
}
# Tokens/s per GPU and GiB of all of Qwen3-30B-A3B. A GPU of 80 GB is an H200 whose allocator was limited to 76 GiB.
MEASURED = {
    (method, "Qwen/Qwen3-30B-A3B", one.case.ranks, "H100" if one.cap_gib else "H200"): (one.rate, one.gib)
    for one in measured()
    for method, settings in METHODS.items()
    if one.case.layers == 48 and one.case == dataclasses.replace(one.case, **{**ALL_WEIGHTS, **settings})
}


def cell(method: str, model: str, ranks: int, gpu: str) -> str:
    """Tokens/s per GPU and GiB of the layout that `lightning-ep plan` takes; empty where none fits."""
    if (method, model, ranks, gpu) in MEASURED:
        rate, gib = MEASURED[method, model, ranks, gpu]
        return f"**{rate:,}** ({gib:.0f})"
    request = Request(find_model(model), GPUS[gpu], ranks, **METHODS[method])
    found = fitting(request)
    if not found:
        return ""
    chosen = choose(found)
    return f"{chosen.rate:,.0f} ({chosen.gib:.0f})"


def table(method: str) -> str:
    """A row for every model, a column for every machine."""
    lines = [
        f"| | {' | '.join(f'{ranks} x {gpu}' for ranks, gpu in MACHINES)} |",
        "|---|" + "---|" * len(MACHINES),
    ]
    for model in MODELS:
        cells = " | ".join(cell(method, model, *machine) for machine in MACHINES)
        lines.append(f"| {model.rpartition('/')[2]} | {cells} |")
    return "\n".join(lines)


def section(method: str) -> str:
    """A heading and its table."""
    return f"## {method}\n\n{table(method)}\n"


def main() -> None:
    """Writes the tables between the marks of the page."""
    head, mark, rest = PAGE.read_text().partition("<!-- python -m benchmarks.resources -->\n")
    _, end, tail = rest.partition("<!-- end -->\n")
    PAGE.write_text(head + mark + "\n" + "\n".join(map(section, METHODS)) + "\n" + end + tail)


if __name__ == "__main__":
    main()
