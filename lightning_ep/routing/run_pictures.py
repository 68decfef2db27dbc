"""Pictures of a run: how routing has been, and how it became so. Needs matplotlib, the extra ``pictures``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_ep.routing import pictures
from lightning_ep.routing.history import Entry, History
from lightning_ep.routing.words import short_names

_SPANS = 4  # of a run


def figures(history: History, layers: Sequence[str]) -> dict[str, Any]:
    """The pictures of a run by name; that of ranks where there are several."""
    spans = history.spans(_SPANS)
    found = {"expert_load": expert_load(spans, layers), "load_curves": load_curves(history.entries, layers)}
    if spans[-1].measures.rank_load_MW.shape[1] > 1:
        found["straggler_factor"] = straggler_factor(history.entries, spans[-1], layers)
    return found


def expert_load(spans: Sequence[Entry], layers: Sequence[str]) -> Any:
    """The last span large, with what is unusual named, and those before it small: a figure."""
    from matplotlib.figure import Figure

    *before, last = spans
    rows = min(14.0, 3.2 + 0.2 * len(layers))
    figure = Figure(figsize=(11, rows + (2.6 if before else 0)), layout="constrained", dpi=110)
    grid = figure.add_gridspec(2 if before else 1, max(1, len(before)), height_ratios=[rows, 2.6][: 2 if before else 1])
    large = figure.add_subplot(grid[0, :])
    pictures.heat_map(last.measures.load_ME, layers, large)
    large.set_title(f"Load of experts, {_steps(last)}\n{large.get_title(loc='left')}", loc="left", fontsize=10)
    for column, entry in enumerate(before):
        small = figure.add_subplot(grid[1, column])
        pictures.heat_map(entry.measures.load_ME, layers, small, named=False)
        small.set_title(f"before: {_steps(entry)}", loc="left", fontsize=9)
    return figure


def load_curves(entries: Sequence[Entry], layers: Sequence[str]) -> Any:
    """Violation, variation, entropy and dead experts of every layer by step: a figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 11), layout="constrained", dpi=110)
    steps, names = [entry.last for entry in entries], short_names(layers)
    panels = [
        ("max violation: how far the hottest expert of a layer is above the mean (0: balanced)", "max_violation_M"),
        ("coefficient of variation of the experts' tokens (0: balanced)", "variation_M"),
        ("entropy of the router, share of ln E (0: certain, 1: undecided)", "entropy_M"),
        ("experts of a layer without a token (routing/dead_experts is their sum)", "dead_ME"),
    ]
    for place, (title, field) in enumerate(panels):
        ax = figure.add_subplot(len(panels), 1, place + 1)
        values = torch.stack([getattr(entry.measures, field) for entry in entries])
        pictures.curves(ax, steps, (values.sum(-1) if values.dim() == 3 else values).double(), names, bottom=0)
        ax.set_title(title, loc="left", fontsize=9)
    ax.set_xlabel("step; layers from the first (yellow) to the last (purple); named are those farthest from the others")
    return figure


def straggler_factor(entries: Sequence[Entry], last: Entry, layers: Sequence[str]) -> Any:
    """The straggler factor of every layer by step, and which rank it was in the last span: a figure."""
    from matplotlib.figure import Figure

    names = short_names(layers)
    figure = Figure(figsize=(10, 5.5 + min(6.0, 0.2 * len(layers))), layout="constrained", dpi=110)
    grid = figure.add_gridspec(2, 1, height_ratios=[4, 2 + min(6.0, 0.2 * len(layers))])
    above = figure.add_subplot(grid[0])
    values_NM = torch.stack([entry.measures.straggler_M for entry in entries])
    above.axhline(1, color="gray", linestyle=":", linewidth=1)
    pictures.curves(above, [entry.last for entry in entries], values_NM, names)
    above.set_title(
        "straggler factor: pairs of token and expert of the busiest rank over the mean (1: balanced)",
        loc="left",
        fontsize=9,
    )
    above.set_xlabel("step")
    below = figure.add_subplot(grid[1])
    loads_MW = last.measures.rank_load_MW
    image = below.imshow(loads_MW.numpy(), aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2)
    layer, rank = divmod(int(loads_MW.nan_to_num(nan=0.0).argmax()), loads_MW.shape[1])
    below.set_title(
        f"{_steps(last)}: in layer {names[layer]} rank {rank} has {loads_MW[layer, rank]:.2f} times the mean",
        loc="left",
        fontsize=9,
    )
    pictures.ticks(below.set_yticks, names, 24)
    pictures.ticks(below.set_xticks, [str(each) for each in range(loads_MW.shape[1])], 16)
    below.set_xlabel("rank")
    below.set_ylabel("layer")
    bar = figure.colorbar(image, ax=below, label="pairs of a rank over the mean", extend="max")
    bar.set_ticks([0, 0.5, 1, 1.5, 2], labels=["0", "1/2", "1: even", "1.5", "2 or more"])
    return figure


def _steps(entry: Entry) -> str:
    return f"step {entry.last}" if entry.first == entry.last else f"steps {entry.first} to {entry.last}"
