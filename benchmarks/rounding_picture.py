"""The curves of `benchmarks.rounding` as an SVG: validation losses of every run, and their distances from fp32's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_WIDTH, _HEIGHT, _TOP, _GAP = 360, 220, 40, 70
_COLOURS = {"fp32 masters": "#333333", "bf16, stochastic": "#1f77b4", "bf16, nearest": "#d62728"}
Curve = list[tuple[int, float]]


def picture(runs: Sequence[dict[str, Any]]) -> str:
    """Two panels, a line for each run."""
    fp32 = {run["seed"]: dict(run["validation"]) for run in runs if run["way"] == "fp32 masters"}
    losses = [(run["way"], [tuple(point) for point in run["validation"]]) for run in runs]
    apart = [
        (run["way"], [(step, loss - fp32[run["seed"]][step]) for step, loss in run["validation"]])
        for run in runs
        if run["way"] != "fp32 masters"
    ]
    panels = [
        _panel(0, "validation loss, nats per token", losses),
        _panel(1, "the same, minus that of fp32 masters with the same seed", apart),
    ]
    legend = [
        f'<rect x="{_GAP + 150 * number}" y="{_TOP + _HEIGHT + 34}" width="14" height="3" fill="{colour}"/>'
        f'<text x="{_GAP + 150 * number + 20}" y="{_TOP + _HEIGHT + 39}">{way}</text>'
        for number, (way, colour) in enumerate(_COLOURS.items())
    ]
    style = "text{font:11px sans-serif;fill:#333}.a{stroke:#999;fill:none}.l{fill:none;stroke-width:1.3}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * (_WIDTH + _GAP) + 20}" height="{_HEIGHT + _TOP + 50}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join([*panels, *legend])
    ) + "\n</svg>\n"


def _panel(index: int, title: str, curves: Sequence[tuple[str, Curve]]) -> str:
    left = _GAP + index * (_WIDTH + _GAP)
    points = [point for _, curve in curves for point in curve]
    last = max(step for step, _ in points)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    spread = (high - low) or 1.0

    def at(step: int, loss: float) -> str:
        return f"{left + _WIDTH * step / last:.1f} {_TOP + _HEIGHT * (0.95 - 0.9 * (loss - low) / spread):.1f}"

    drawn = [f'<text x="{left}" y="{_TOP - 14}">{title}</text>']
    drawn.append(f'<path class="a" d="M{left} {_TOP}V{_TOP + _HEIGHT}H{left + _WIDTH}"/>')
    for loss in (low, (low + high) / 2, high):
        x, y = at(0, loss).split()
        drawn.append(f'<text x="{float(x) - 6:.0f}" y="{float(y) + 4:.0f}" text-anchor="end">{loss:.4g}</text>')
    for step in (0, last // 2, last):
        x = at(step, low).split()[0]
        drawn.append(f'<text x="{x}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{step}</text>')
    for way, curve in curves:
        path = "L".join(at(*point) for point in curve)
        drawn.append(f'<path class="l" stroke="{_COLOURS[way]}" d="M{path}"/>')
    return "\n".join(drawn)
