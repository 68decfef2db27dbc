"""Pictures of a run name what was planted in it, and no text lies on another."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from lightning_ep import ParallelLayout
from lightning_ep.routing import Routed, RoutingSummary
from lightning_ep.routing.history import History
from lightning_ep.routing.run_pictures import figures

TOP_K, STEPS = 2, 6


def _pictures(layers: int, experts: int, ranks: int, hot: int | None = None, dead: int | None = None) -> dict[str, Any]:
    """Those of a run in which an expert of one layer grows hot, and another layer comes to use four experts alone."""
    names = {f"model.layers.{layer}.mlp.experts": experts for layer in range(layers)}
    generator, history = torch.Generator().manual_seed(0), History()
    for step in range(1, STEPS + 1):
        routed = []
        for layer in range(layers):
            logits_TE = torch.randn(256, experts, generator=generator)
            if layer == hot:
                logits_TE[:, experts // 2] += step
            if layer == dead:
                logits_TE[:, 4:] -= 4 * step
            entropy_T = torch.special.entr(logits_TE.softmax(-1)).sum(-1)
            routed.append(Routed(logits_TE.topk(TOP_K).indices, None, entropy_T))
        metric = RoutingSummary(names, ParallelLayout(ranks, ep=ranks, fsdp=1))
        metric.update(routed)
        history.add(10 * step, metric.measures(metric.totals_MC))
    return figures(history, list(names))


def _texts(ax: Any) -> list[Text]:
    """What is written in and around axes; of ticks those within the limits, since no others are drawn."""
    found = [*ax.texts, ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label]
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        found += [label for place, label in ticks if low <= place <= high]
    return [text for text in found if text.get_text()]


def _overlaps(figure: Any) -> list[tuple[str, str]]:
    """Texts that lie on one another, or beyond the edge."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for ax in figure.axes for text in _texts(ax)]
    assert len(texts) > 20, "there are texts"
    boxes = [(text.get_text(), Text.get_window_extent(text, canvas.get_renderer()).padded(-1)) for text in texts]
    found = [(a, b) for (a, first), (b, second) in itertools.combinations(boxes, 2) if first.overlaps(second)]
    edge = figure.bbox.padded(2)
    return found + [(a, "the edge") for a, box in boxes if not (edge.contains(*box.min) and edge.contains(*box.max))]


@pytest.mark.parametrize(
    ("layers", "experts", "ranks", "planted"),
    [(24, 64, 8, {"hot": 16, "dead": 8}), (2, 8, 2, {}), pytest.param(48, 128, 2, {}, marks=pytest.mark.slow)],
)
def test_no_text_lies_on_another(layers: int, experts: int, ranks: int, planted: dict[str, int]) -> None:
    for name, figure in _pictures(layers, experts, ranks, **planted).items():
        assert _overlaps(figure) == [], name


def test_curves_name_the_layers_that_are_apart_and_the_mean() -> None:
    found = _pictures(12, 16, 4, hot=7, dead=3)
    violation, variation, entropy, dead = ([text.get_text() for text in ax.texts] for ax in found["load_curves"].axes)
    for texts in (violation, variation, entropy):
        assert any(text.startswith("layer 7: ") for text in texts)
        assert any(text.startswith("layer 3: ") for text in texts)
        assert len(texts) == 4
        assert any(text.startswith("mean of the layers: ") for text in texts)
    assert dead == ["mean of the layers: 1", "layer 3: 12"], "no other layer has any"
    assert any(text.get_text() == "layer 3: 4" for text in found["straggler_factor"].axes[0].texts), "one rank of four"
