"""W ranks equal one process on the concatenated batch: loss, each gradient, the clipped norm, weights after 3 steps."""

from __future__ import annotations

import pytest

from tests.parity import assert_trains_like_one_process

PLAIN = [
    {"causal": False, "accumulate": 1, "clip": None, "stock": True},
    {"causal": True, "accumulate": 1, "clip": 0.2, "stock": True},
    {"causal": False, "accumulate": 3, "clip": 0.2, "stock": True},
    {"causal": True, "accumulate": 3, "clip": 0.2, "stock": True},
]
MODELS = [
    {"causal": True, "accumulate": 1, "clip": 0.2, "overrides": {"mlp_only_layers": [0]}},
    {"causal": True, "accumulate": 1, "clip": 0.2, "overrides": {"num_experts_per_tok": 8}},
    {"causal": True, "accumulate": 1, "clip": 0.2, "overrides": {"tie_word_embeddings": True}},
    {"causal": True, "accumulate": 1, "clip": 0.2, "implementation": "eager"},
    {"causal": False, "accumulate": 1, "clip": 0.2, "overrides": {"norm_topk_prob": False, "num_experts_per_tok": 1}},
]
BF16 = [
    {"causal": False, "accumulate": 1, "clip": 0.2, "precision": "bf16-mixed"},
    {"causal": True, "accumulate": 3, "clip": 0.2, "precision": "bf16-mixed"},
]
# The tiny models' layers have 3,408 dense parameters each: all are gathered together but here.
GROUPS = [
    {"causal": True, "accumulate": 3, "clip": 0.2, "grouped_parameters": 0, "overrides": {"num_hidden_layers": 3}},
    {"causal": False, "accumulate": 1, "clip": 0.2, "grouped_parameters": 7000, "overrides": {"num_hidden_layers": 5}},
    {
        "causal": True,
        "accumulate": 1,
        "clip": 0.2,
        "recompute": "full",
        "grouped_parameters": 7000,
        "overrides": {"num_hidden_layers": 4, "mlp_only_layers": [0]},
    },
]


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2), pytest.param(4, 4, marks=pytest.mark.slow)])
def test_training_equals_one_process(world: int, ep: int) -> None:
    assert_trains_like_one_process(world, {"ep": ep}, PLAIN)


@pytest.mark.parametrize(("world", "ep"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_models_with_dense_layers_ties_and_extreme_top_k(world: int, ep: int) -> None:
    assert_trains_like_one_process(world, {"ep": ep}, MODELS)


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2), (2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_layers_that_are_gathered_alone_or_together(world: int, ep: int) -> None:
    assert_trains_like_one_process(world, {"ep": ep}, GROUPS)


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_bf16_mixed_is_within_bf16_tolerance(world: int, ep: int) -> None:
    assert_trains_like_one_process(world, {"ep": ep}, BF16)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_train_alike(backend: str) -> None:
    case = {"causal": True, "accumulate": 1, "clip": 0.2, "compile": backend}
    assert_trains_like_one_process(2, {"ep": 2}, [case], timeout=110)
