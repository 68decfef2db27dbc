"""Draws docs/operate/rounding.svg: loss curves of bf16 weights, rounded in two ways, beside fp32 masters.

python docs/_ext/curves.py

They are the last table of the record, as `python -m benchmarks.rounding` writes it.
"""

from __future__ import annotations

import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "2026-11-29-rounding.md"
PICTURE = ROOT / "docs" / "operate" / "rounding.svg"
FP32, NEAREST = "fp32 masters", "bf16, nearest"
STYLES = {FP32: ("#bbbbbb", 4), "bf16, stochastic": ("#1f77b4", 1.2), NEAREST: ("#d62728", 1.2)}


def curves() -> list[tuple[str, dict[int, float]]]:
    """The way and the loss by step of each run."""
    lines = RECORD.read_text().rstrip().rpartition("\n\n")[2].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    steps = [int(step) for step in header[2:]]
    return [(way, dict(zip(steps, map(float, losses), strict=True))) for way, _, *losses in rows]


def description() -> str:
    """All numbers of the picture."""
    return "; ".join(f"{way}: " + ", ".join(map(str, losses.values())) for way, losses in curves())


def draw() -> None:
    """Losses of every run; and how far those of the ways that keep up are from the mean of fp32's seeds."""
    import matplotlib.pyplot as plt

    plt.rc("svg", fonttype="none", hashsalt="benchmarks")
    figure, (whole, apart) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    masters = [losses for way, losses in curves() if way == FP32]
    labelled: set[str] = set()
    for way, losses in curves():
        colour, width = STYLES[way]
        label = None if way in labelled else way
        labelled.add(way)
        whole.plot(list(losses), list(losses.values()), color=colour, linewidth=width, label=label)
        if way != NEAREST:
            differences = [loss - statistics.fmean(one[step] for one in masters) for step, loss in losses.items()]
            apart.plot(list(losses), differences, color=colour, linewidth=width)
    whole.set(title="validation loss, nats per token", xlabel="step")
    apart.set(title="the same, minus the mean of fp32 masters", xlabel="step")
    whole.legend()
    figure.savefig(PICTURE, metadata={"Date": None, "Description": description()})


if __name__ == "__main__":
    draw()
