"""Choices that no router made: equally many tokens for each expert, or Zipf's law, the same in every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lightning_ep import CausalLM, ExpertParallelStrategy
from lightning_ep.routing import BalancingLoss, BiasUpdates, ForcedBalance, RoutingCounts, SkewedRouting
from lightning_ep.routing.choices import choice_of
from lightning_ep.routing.observe import choose, moe_layers
from lightning_ep.routing.router_rules import RouterRule
from tests.ranks import run_ranks
from tests.reference import batches, tiny_config, tiny_model
from tests.tiny import quiet


def _chosen(rule: RouterRule, tokens: int = 32) -> Tensor:
    """``[L, T, K]``: what reaches the experts of plain transformers."""
    model = tiny_model()
    choose(model, choice_of(rule))
    taken: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Qwen3MoeExperts):
            module.register_forward_pre_hook(lambda _, args: taken.append(args[1]))  # behind what chooses
    with torch.no_grad():
        model(input_ids=batches(1, 1, tokens)[0]["input_ids"])
    return torch.stack(taken)


def test_forced_balance_chooses_every_expert_equally_often() -> None:
    for ids_TK in _chosen(ForcedBalance()):
        assert ids_TK.flatten().bincount().tolist() == [16] * 8
        assert all(len(set(row)) == 4 and {e // 4 for e in row} == {0, 1} for row in ids_TK.tolist())


def test_skewed_choices_follow_zipfs_law_and_are_the_same_again() -> None:
    ids_LTK = _chosen(SkewedRouting(exponent=1.0, seed=3), tokens=60)
    assert torch.equal(ids_LTK, _chosen(SkewedRouting(exponent=1.0, seed=3), tokens=60))
    assert not torch.equal(ids_LTK, _chosen(SkewedRouting(exponent=1.0, seed=4), tokens=60))
    assert all(len(set(row)) == 4 for layer in ids_LTK.tolist() for row in layer)
    assert not torch.equal(ids_LTK[0], ids_LTK[1]), "another order in each layer"
    choice = choice_of(SkewedRouting(exponent=1.0))
    assert choice is not None
    first_T1 = choice(moe_layers(tiny_model())[0], torch.zeros(8192, 1, dtype=torch.int64))
    shares = (first_T1.flatten().bincount() / 8192).sort(descending=True).values
    expected = 1 / torch.arange(1, 9) / (1 / torch.arange(1, 9)).sum()
    assert torch.allclose(shares, expected, atol=0.02)


def _counts(root: Path, router: Any, options: dict[str, Any]) -> Tensor:
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    module = CausalLM(tiny_config(), pretrained=False, optimizer=sgd, router=router)
    trainer = quiet(root, strategy=ExpertParallelStrategy(ep=2, **options), max_steps=1)
    module.on_fit_start = lambda: setattr(module, "counts", RoutingCounts(module))  # type: ignore[method-assign]
    trainer.fit(module, DataLoader(batches(2, 2, 16), batch_size=None))  # type: ignore[arg-type]
    return module.counts.take()  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("mode", ["none", "full"])
def test_experts_on_ranks_get_the_choices_that_are_counted(mode: str, tmp_path: Path) -> None:
    options = {"activation_checkpointing": mode}
    for counts_LE in run_ranks(2, _counts, tmp_path, ForcedBalance(), options, init_process_group=False):
        assert (counts_LE == counts_LE[0, 0]).all()
        assert counts_LE.sum() == 2 * 2 * 16 * 4


@pytest.mark.parametrize(
    ("router", "error", "what"),
    [
        ([ForcedBalance(), ForcedBalance()], ValueError, "two of a kind"),
        ([ForcedBalance(), SkewedRouting()], ValueError, "says who is chosen, so that nothing else can"),
        (["balance"], TypeError, "'balance' is no rule for routers"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(router: Any, error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        CausalLM(tiny_config(), pretrained=False, router=router)


def test_rules_come_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=CausalLM)
    rules = [
        {"class_path": "lightning_ep.routing.BalancingLoss", "init_args": {"coefficient": 0.5}},
        {"class_path": "lightning_ep.routing.BiasUpdates"},
    ]
    init_args = {"model": {"model_type": "qwen3_moe", "num_hidden_layers": 1}, "pretrained": False, "router": rules}
    config = parser.parse_object({"model": {"class_path": "lightning_ep.CausalLM", "init_args": init_args}})
    assert parser.instantiate(config).model.router_rules == (BalancingLoss(0.5), BiasUpdates(1e-3))
    with pytest.raises(ValueError, match=r"BalancingLoss\(coefficient=0.0\) must be positive"):
        BalancingLoss(0.0)
