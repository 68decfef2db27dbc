"""Pictures of routing, each of which names what is unusual in it. Needs matplotlib, the extra ``pictures``."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_ep.routing.words import short_names

_NAMED = 3  # cells, or layers, that are named in a picture
_HOT = 2.0  # times the mean, from which a cell is
_RANGE = 8.0  # times the mean, and its inverse, at the ends of the colours
_DEAD, _ABSENT = "black", "lightgray"


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save(figure: Any, path: Path) -> Path:
    """Writes a PNG that is never half a one."""
    part = path.with_suffix(".part")
    figure.savefig(part, format="png")
    return part.replace(path)


def _axes(ax: Any, width: float, height: float) -> tuple[Any, Any]:
    """A figure of its own, unless there are axes; never pyplot's, which keeps figures and asks for a display."""
    if ax is not None:
        return ax.get_figure(), ax
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    return figure, figure.add_subplot()


def heat_map(load_ME: Tensor, layers: Sequence[str], ax: Any = None, named: bool = True) -> tuple[Any, Any]:
    """Layers (down) by experts (across): red is above the mean, blue below, black without a token.

    Args:
        load_ME: Tokens over the mean of the layer; NaN where there is no expert.
        layers: Names of the layers.
        ax: Axes to draw into. Default: a new figure's.
        named: Mark and name the hottest cells, and layers with experts without a token.

    Returns:
        Figure and axes.
    """
    load_ME = load_ME.detach().double().cpu()
    figure, ax = _axes(ax, 9, min(14.0, 2.6 + 0.24 * load_ME.shape[0]))
    names = short_names(layers)
    image = _map(ax, load_ME, names, (24, 16) if named else (8, 8))
    if not named:
        return figure, ax
    _bar(figure, ax, image, "tokens of an expert\nover the mean of its layer")
    lines = _name_hot(ax, load_ME, names) + _name_dead(ax, load_ME, names)
    ax.set_title("\n".join(lines), loc="left", fontsize=9)
    return figure, ax


def _map(ax: Any, load_ME: Tensor, names: Sequence[str], most: tuple[int, int]) -> Any:
    """Cells on a scale of ratios around 1, with so many ticks for layers and experts at most."""
    from matplotlib.colors import LogNorm

    cells_ME = load_ME.masked_fill(load_ME == 0, torch.nan)
    dead_ME = torch.where(load_ME == 0, 1.0, torch.nan)
    shown = {"aspect": "auto", "interpolation": "nearest"}
    ax.set_facecolor(_ABSENT)
    image = ax.imshow(cells_ME.numpy(), cmap="RdBu_r", norm=LogNorm(1 / _RANGE, _RANGE), **shown)
    ax.imshow(dead_ME.numpy(), cmap="gray", vmin=1, vmax=2, **shown)
    ticks(ax.set_yticks, names, most[0])
    ticks(ax.set_xticks, [str(expert) for expert in range(load_ME.shape[1])], most[1])
    ax.set_xlabel("expert")
    ax.set_ylabel("layer")
    return image


def _bar(figure: Any, ax: Any, image: Any, label: str) -> None:
    ticks = [1 / _RANGE, 1 / 4, 1 / 2, 1, 2, 4, _RANGE]
    bar = figure.colorbar(image, ax=ax, ticks=ticks, label=label)
    bar.ax.set_yticklabels(["1/8 or less", "1/4", "1/2", "1: even", "2", "4", "8 or more"])
    bar.ax.minorticks_off()


def ticks(set_ticks: Any, names: Sequence[str], most: int) -> None:
    """So many ticks at most, from the first, at a distance that is a power of two."""
    step = 1
    while len(names) > step * most:
        step *= 2
    set_ticks(range(0, len(names), step), names[::step])


def _name_hot(ax: Any, load_ME: Tensor, names: Sequence[str]) -> list[str]:
    """Frames the hottest cells; one line of text."""
    from matplotlib.patches import Rectangle

    hottest_M = load_ME.nan_to_num(nan=0.0).max(1)  # one of each layer, or a layer that has collapsed had them all
    found = []
    for layer in hottest_M.values.argsort(descending=True, stable=True)[:_NAMED].tolist():
        load, expert = hottest_M.values[layer].item(), int(hottest_M.indices[layer])
        if load >= _HOT:
            ax.add_patch(Rectangle((expert - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor="lime", linewidth=2))
            found.append(f"layer {names[layer]} expert {expert} ({load:.1f})")
    said = f"hottest (green), times the mean: {', '.join(found)}"
    return _lines(said if found else f"no expert has {_HOT:g} times the mean of its layer")


def _name_dead(ax: Any, load_ME: Tensor, names: Sequence[str]) -> list[str]:
    """Marks layers with experts without a token, beside the map; one line of text."""
    dead_M, number_M = (load_ME == 0).sum(1), (~load_ME.isnan()).sum(1)
    found = []
    for layer in dead_M.argsort(descending=True, stable=True)[:_NAMED].tolist():
        if (dead := int(dead_M[layer])) > 0:
            which = f" ({int((load_ME[layer] == 0).nonzero()[0])})" if dead == 1 else ""
            found.append(f"layer {names[layer]}: {dead} of {int(number_M[layer])} experts{which}")
    for layer, dead in enumerate(dead_M.tolist()):
        if 2 * dead >= int(number_M[layer]) > 0:
            ax.annotate("◀", (1, layer), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=_DEAD)
    return _lines(f"without a token (black): {', '.join(found)}" if found else "every expert has got tokens")


def _lines(text: str) -> list[str]:
    """In the width of a picture; names of layers may be long."""
    return textwrap.wrap(text, 110)


def of_layers(
    values: Tensor | Sequence[Tensor], layers: Sequence[str], title: str, balanced: float | None, ax: Any = None
) -> tuple[Any, Any]:
    """Bars of one number per layer ``[M]``, or of a sequence of such values a curve per layer: figure and axes.

    ``balanced``, if given, is drawn as a line.
    """
    figure, ax = _axes(ax, 7, 3.5)
    names = short_names(layers)
    if balanced is not None:
        ax.axhline(balanced, color="gray", linestyle=":", linewidth=1)
    if isinstance(values, Tensor):
        ax.bar(range(len(names)), values.detach().double().cpu().reshape(-1).tolist())  # torchmetrics squeezes
        ticks(ax.set_xticks, names, 24)
        ax.set_xlabel("layer")
    else:
        curves(
            ax,
            list(range(1, len(values) + 1)),
            torch.stack([v.reshape(-1) for v in values]).detach().double().cpu(),
            names,
        )
        ax.set_xlabel("value")
    ax.set_title(title, loc="left", fontsize=9)
    return figure, ax


def curves(ax: Any, steps: Sequence[int], values_NM: Tensor, names: Sequence[str], bottom: float | None = None) -> None:
    """A thin curve for each layer, from the first (yellow) to the last (purple), and their mean.

    At the end the mean is named, and the layers that are farthest from the others.

    Args:
        ax: Axes.
        steps: Of each value.
        values_NM: The values; NaN where there is none.
        names: Of the layers.
        bottom: The lowest value that is shown. Default: the lowest that there is.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    number, ends_M, means_N = values_NM.shape[1], values_NM[-1], values_NM.nanmean(1)
    colors = [colormaps["viridis_r"](0.1 + 0.9 * layer / max(1, number - 1)) for layer in range(number)]
    marker = "." if len(steps) < 20 else None
    for layer in range(number):
        ax.plot(steps, values_NM[:, layer].tolist(), color=colors[layer], linewidth=0.8, alpha=0.8, marker=marker)
    ax.plot(steps, means_N.tolist(), color="black", linewidth=2)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    if bottom is not None:
        ax.set_ylim(bottom=bottom)
    apart_M = (ends_M - ends_M.nanmedian()).abs().nan_to_num(nan=0.0)
    named = [layer for layer in apart_M.argsort(descending=True, stable=True).tolist()[:_NAMED] if apart_M[layer] > 0]
    labels = [(ends_M[layer].item(), f"layer {names[layer]}: {ends_M[layer]:.3g}", colors[layer]) for layer in named]
    if not means_N[-1].isnan():
        labels.append((means_N[-1].item(), f"mean of the layers: {means_N[-1]:.3g}", "black"))
    _label_ends(ax, steps[-1], labels)


def _label_ends(ax: Any, step: int, labels: list[tuple[float, str, Any]]) -> None:
    """Writes texts beside the axes at the height of the values where curves end, and apart from one another."""
    low, high = ax.get_ylim()
    line = 11 / (ax.get_position().height * ax.get_figure().get_figheight() * 72)  # of a text, as a share of the axes
    heights = [(value - low) / (high - low) for value, _, _ in sorted(labels)]
    for place in range(1, len(heights)):  # upwards, until they are apart; then down again, from above the axes
        heights[place] = max(heights[place], heights[place - 1] + line)
    top = 1.0
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], top)
        top = heights[place] - line
    for height, (value, text, color) in zip(heights, sorted(labels), strict=True):
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 0}
        at = {"textcoords": "axes fraction", "annotation_clip": False, "va": "center", "fontsize": 8}
        ax.annotate(text, (step, value), (1.03, height), arrowprops=leader, **at)


def specialisation(lifts: Mapping[str, Tensor], layers: Sequence[str]) -> Any:
    """A map for each source of how much more often its tokens go to each expert than those of the others: a figure."""
    from matplotlib.figure import Figure

    height = min(14.0, 2.2 + 0.16 * len(layers))
    figure = Figure(figsize=(10, height * len(lifts)), layout="constrained", dpi=110)
    for place, (name, lift_ME) in enumerate(lifts.items()):
        ax = figure.add_subplot(len(lifts), 1, place + 1)
        image = _map(ax, lift_ME.clamp(max=_RANGE), short_names(layers), (24, 16))
        _bar(figure, ax, image, "times as often as in the others")
        ax.set_title(
            f"{name}: red experts are for it, blue for the others, black for the others only", loc="left", fontsize=9
        )
    return figure
