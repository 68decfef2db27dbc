"""A run of any length is kept in bounded memory, and what is wrong in it is found."""

from __future__ import annotations

import functools

import pytest
import torch

from lightning_ep.routing import Measures, Routed, RoutingSummary
from lightning_ep.routing.history import History, findings
from lightning_ep.routing.words import ranges, short_names

EXPERTS = 16


def _measures(ids_TK: torch.Tensor) -> Measures:
    metric = RoutingSummary({"layers.3.experts": EXPERTS})
    metric.update([Routed(ids_TK)])
    return metric.measures(metric.totals_MC)


@functools.cache
def _repeated(step: int) -> Measures:
    return _measures(torch.tensor([[step % 2, 2 + step % 3]]))


def _one_expert_of(step: int) -> Measures:
    return _repeated(step % 6)


@pytest.mark.parametrize("steps", [1, 256, 257, 600])
def test_neighbours_are_merged_into_exact_means(steps: int) -> None:
    history = History()
    for step in range(1, steps + 1):
        history.add(step, _one_expert_of(step))
    assert len(history) == steps
    assert len(history.entries) <= 256
    assert sum(entry.number for entry in history.entries) == steps
    for before, after in zip(history.entries, history.entries[1:], strict=False):
        assert after.first == before.last + 1
    (whole,) = history.spans(1)
    expected = torch.stack([_one_expert_of(step).load_ME for step in range(1, steps + 1)]).mean(0)
    torch.testing.assert_close(whole.measures.load_ME, expected)
    assert whole.measures.tokens_M.tolist() == [steps]
    alive = {expert for step in range(1, steps + 1) for expert in (step % 2, 2 + step % 3)}
    assert whole.measures.dead_ME[0].logical_not().nonzero().flatten().tolist() == sorted(alive), "dead in all steps"
    spans = history.spans(4)
    assert [spans[0].first, spans[-1].last] == [1, steps]
    assert history.latest().number == min(10, steps)


def test_steps_without_tokens_have_no_weight() -> None:
    history = History()
    history.add(1, _measures(torch.tensor([[0, 1]])))
    history.add(2, _measures(torch.zeros(0, 2, dtype=torch.long)))
    assert history.latest().measures.load_ME[0, :3].tolist() == [8, 8, 0]
    assert history.latest().measures.tokens_M.tolist() == [1]


def test_findings_are_of_layers_that_had_tokens_enough() -> None:
    even = torch.arange(EXPERTS).repeat(40).view(-1, 2)
    assert findings(_measures(even)) == []
    assert findings(_measures(even[:8])) == [], "too few to say"
    (lacking,) = findings(_measures(even[even[:, 0] < 14]))
    assert lacking.sentence("3") == "in layer 3 experts 14, 15 of 16 got no token"
    (collapsed,) = findings(_measures(torch.tensor([[5, 7]]).expand(600, 2)))
    assert collapsed.sentence("3") == (
        "layer 3 has collapsed to about 2.0 of 16 experts (experts 0 to 4, 6, 8 to 15 of 16 got none)"
    )


def test_layers_are_called_by_numbers_that_tell_them_apart() -> None:
    assert short_names(["model.layers.0.mlp.experts", "model.layers.12.mlp.experts"]) == ["0", "12"]
    towers = ["vision.layers.0.experts", "text.layers.0.experts"]
    assert short_names(towers) == towers
    assert ranges([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7, 8"
