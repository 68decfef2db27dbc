"""Metrics of routing are those of one process that counts token by token, on any layout."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ep.layout import ParallelLayout
from lightning_ep.routing.metrics import (
    DeadExperts,
    ExpertLoad,
    LoadVariation,
    MaxViolation,
    Measures,
    Routed,
    RouterEntropy,
    RoutingMetric,
    RoutingSummary,
    RowsPerToken,
    StragglerFactor,
)
from lightning_ep.routing.watched import entropy
from tests.ranks import device, run_ranks

EXPERTS = {"layers.0.experts": 8, "layers.1.experts": 8, "layers.5.experts": 4}
WORLD, TOP_K, PASSES = 4, 3, 2
TOKENS = [7, 40, 0, 23]  # of every rank


def _pass(rank: int, number: int) -> tuple[list[Tensor], Tensor]:
    """Logits ``[T, E]`` of every layer, in float64 and far from even, and which tokens count; rank 2 has none."""
    generator = torch.Generator().manual_seed(10 * rank + number)
    size = TOKENS[rank] + (number if TOKENS[rank] else 0)
    logits = []
    for layer, experts in enumerate(EXPERTS.values()):
        popular = torch.linspace(2.0, -2.0, experts).roll(layer)
        logits.append(torch.randn(size, experts, generator=generator).double() + popular)
    return logits, torch.rand(size, generator=generator) > 0.3


def _routed(logits: list[Tensor], counted_T: Tensor) -> list[Routed | None]:
    counted_T = counted_T.to(device())
    found: list[Routed | None] = []
    for logits_TE in logits:
        entropy_T = torch.special.entr(logits_TE.softmax(-1)).sum(-1)
        found.append(Routed(logits_TE.topk(TOP_K).indices.to(device()), counted_T, entropy_T.to(device())))
    return found


def _of_rank(ep: int) -> dict[str, Tensor]:
    """What one metric says on this rank after two forwards, and that the others, each for itself, say the same."""
    layout, rank = ParallelLayout(WORLD, ep=ep, fsdp=WORLD // ep), dist.get_rank()
    kinds: dict[str, type[RoutingMetric]] = {
        "load_ME": ExpertLoad, "max_violation_M": MaxViolation, "variation_M": LoadVariation,
        "entropy_M": RouterEntropy, "straggler_M": StragglerFactor, "rows_M": RowsPerToken, "dead": DeadExperts,
    }  # fmt: skip
    summary = RoutingSummary(EXPERTS, layout, rank).to(device())
    metrics = {name: kind(EXPERTS, layout, rank).to(device()) for name, kind in kinds.items()}
    for number in range(PASSES):
        logits, counted_T = _pass(rank, number)
        for metric in (summary, *metrics.values()):
            metric.update(_routed(logits, counted_T))
    reduced: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        all_reduce = dist.all_reduce
        patch.setattr(dist, "all_reduce", lambda sums, **kwargs: (reduced.append(sums), all_reduce(sums, **kwargs)))
        patch.setattr(dist, "barrier", None)
        patch.setattr(dist, "all_gather", None)
        found = summary.compute()
        assert len(reduced) == 1, "one all-reduce gives every number of every layer"
    for name, metric in metrics.items():
        expected = found["dead_ME"].sum(1) if name == "dead" else found[name]
        assert torch.equal(metric.compute().nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0)), name
    return found


def _expected(ep: int) -> dict[str, Any]:
    """Token by token, in Python's floats."""
    layers: list[dict[str, Any]] = []
    for layer, experts in enumerate(EXPERTS.values()):
        tokens, pairs, ranks, entropy, rows = 0, Counter[int](), Counter[int](), 0.0, 0
        for rank in range(WORLD):
            for number in range(PASSES):
                logits, counted_T = _pass(rank, number)
                for row, counts in zip(logits[layer].tolist(), counted_T.tolist(), strict=True):
                    if not counts:
                        continue
                    tokens += 1
                    chosen = sorted(range(experts), key=lambda e, row=row: -row[e])[:TOP_K]  # type: ignore[misc]
                    total = sum(math.exp(x) for x in row)
                    entropy -= sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in row)
                    places = [rank // ep * ep + expert // (experts // ep) for expert in chosen]
                    pairs.update(chosen)
                    ranks.update(places)
                    rows += len(set(places) - {rank})
        counts_E, counts_W = [pairs[e] for e in range(experts)], [ranks[w] for w in range(WORLD)]
        mean = statistics.fmean(counts_E)
        layers.append(
            {
                "load_ME": [count / mean for count in counts_E] + [math.nan] * (max(EXPERTS.values()) - experts),
                "max_violation_M": max(counts_E) / mean - 1,
                "variation_M": statistics.pstdev(counts_E) / mean,
                "entropy_M": entropy / tokens / math.log(experts),
                "dead_ME": [float(count == 0) for count in counts_E] + [0.0] * (max(EXPERTS.values()) - experts),
                "straggler_M": max(counts_W) / statistics.fmean(counts_W),
                "rank_load_MW": [count / statistics.fmean(counts_W) for count in counts_W],
                "rows_M": rows / tokens,
                "tokens_M": tokens,
                "top_k_M": TOP_K,
            }
        )
    return {name: [layer[name] for layer in layers] for name in Measures.__annotations__}


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_every_measure_is_that_of_counting_token_by_token(ep: int) -> None:
    expected = _expected(ep)
    assert min(expected["rows_M"]) > (0.5 if ep > 1 else -1), "rows must travel"
    assert min(expected["straggler_M"]) > 1.1, "ranks must differ"
    found = run_ranks(WORLD, _of_rank, ep)
    for rank in found:
        for name, value in expected.items():
            torch.testing.assert_close(
                rank[name].double(), torch.tensor(value, dtype=torch.float64), rtol=1e-12, atol=1e-12, equal_nan=True
            )


def test_layers_may_be_left_out_and_large_batches_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, counted_T = _pass(1, 0)
    whole = RoutingSummary(EXPERTS).to(device())
    whole.update(_routed(logits, counted_T))
    monkeypatch.setattr("lightning_ep.routing.metrics._AT_ONCE", 1)
    parts = RoutingSummary(EXPERTS).to(device())
    first, second, third = _routed(logits, counted_T)
    parts.update([first, None, third])
    assert parts.compute()["tokens_M"].tolist()[1] == 0
    assert parts.compute()["load_ME"][1].isnan().all(), "a layer without tokens has no load"
    assert not parts.compute()["dead_ME"][1].any(), "nor dead experts"
    parts.update([None, second, None])
    for name, value in whole.compute().items():
        torch.testing.assert_close(parts.compute()[name], value, equal_nan=True)
    parts.reset()
    parts.update([None, None, None])
    assert parts.compute()["tokens_M"].sum() == 0


def test_means_over_layers_are_what_is_logged() -> None:
    metric = RoutingSummary({"a": 4, "b": 4})
    ids = torch.tensor([[0, 1], [0, 2]])
    metric.update([Routed(ids), None])
    means = Measures(**metric.compute()).means()
    assert means["max_violation"] == means["max_violation_worst_layer"] == pytest.approx(1.0)
    assert means["dead_experts"] == 1
    assert means["entropy"].isnan(), "nobody gave an entropy"
    assert Measures(**RoutingSummary({"a": 4}).compute()).means()["max_violation_worst_layer"].isnan()


def test_a_router_whose_scores_are_unknown_has_no_entropy_and_the_others_have() -> None:
    metric = RoutingSummary({"a": 4, "b": 4})
    ids = torch.tensor([[0, 1], [0, 2]])
    metric.update([Routed(ids), Routed(ids, entropy_T=torch.tensor([0.5, 0.7]) * math.log(4))])
    measures = Measures(**metric.compute())
    assert measures.entropy_M.isnan().tolist() == [True, False]
    assert measures.means()["entropy"] == pytest.approx(0.6)
    assert measures.tokens_M.tolist() == [2, 2]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no MoE layer"):
        RoutingSummary({})
    with pytest.raises(ValueError, match=r"ep=4 does not divide the 6 experts of b"):
        RoutingSummary({"a": 8, "b": 6}, ParallelLayout(4, ep=4, fsdp=1))
    with pytest.raises(ValueError, match="routing of 1 layers was given, and there are 3"):
        RoutingSummary(EXPERTS).update([None])


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "probabilities"])
def test_entropy_is_that_of_the_scores_as_shares_of_their_sum(scoring: Any) -> None:
    logits_TE = torch.randn(5, 8).bfloat16()
    scores = {"softmax": logits_TE.double().exp(), "sigmoid": logits_TE.double().sigmoid()}
    given = logits_TE if scoring in scores else logits_TE.float().softmax(1)
    scores_TE = scores.get(scoring, given.double())
    expected_T = torch.distributions.Categorical(probs=scores_TE).entropy()
    torch.testing.assert_close(entropy(given, scoring).double(), expected_T, rtol=1e-5, atol=1e-6)
