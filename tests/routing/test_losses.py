"""Losses of routers are those of one process with the micro-batches of all ranks, in float64, on every layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ep import CausalLM, ExpertParallelStrategy, ParallelLayout, parallelize
from lightning_ep import transformers_adapter as adapter
from lightning_ep.routing import (
    BalancingLoss,
    BiasUpdates,
    RouterZLoss,
    moe_layers,
    router_losses,
    steer_routers,
    step_routers,
)
from lightning_ep.routing.losses import sums_of_layer
from lightning_ep.routing.steer import steerings
from tests.hub.every_family import auto_class_of, tiny_config_of
from tests.ranks import assert_ranks_agree, device, here
from tests.reference import batches, relative_error, tiny_model
from tests.tiny import quiet

NUM_EXPERTS, TOP_K = 8, 4
BALANCE, Z, OWN = 0.5, 0.05, 0.7
_MARKS = (pytest.mark.slow, pytest.mark.timeout(360))
RULES = [BalancingLoss(BALANCE), RouterZLoss(Z)]


def padded_batches(number: int) -> list[dict[str, Tensor]]:
    """Right-padded, each differently; half of what is no padding has no target."""
    data = batches(number, 2, 11)
    for index, batch in enumerate(data):
        lengths = torch.tensor([[3 + index], [11 - index]])
        batch["attention_mask"] = (torch.arange(11)[None] < lengths).long()
        batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
        batch["labels"][:, : 1 + index % 3] = -100
    return data


def _losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token losses of a whole micro-batch, and the three losses of routers, by their papers' formulas."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
    targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    token_losses = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    counted = batch["attention_mask"].flatten().bool()
    balance, z = [], []
    for logits in output.router_logits:
        probabilities = logits[counted].softmax(-1)
        chosen = F.one_hot(probabilities.topk(TOP_K).indices, NUM_EXPERTS).sum(1).double()
        balance.append(NUM_EXPERTS * (chosen.mean(0) * probabilities.mean(0)).sum())
        z.append(logits[counted].logsumexp(-1).square().mean())
    return token_losses.sum(), torch.stack(balance).mean(), torch.stack(z).mean(), output.aux_loss


def _one_process(windows: list[list[dict[str, Tensor]]], weigh: bool) -> tuple[list[float], Any]:
    """Values of one step over micro-batches that hold those of all ranks, and the trained model."""
    model = tiny_model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    micro = [{key: torch.cat([batch[key] for batch in window]) for key in window[0]} for window in windows]
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in micro]
    loss, values = torch.zeros((), dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for batch, number in zip(micro, tokens, strict=True):
        summed, balance, z, own = _losses(model, batch)
        weight = number / sum(tokens) if weigh else 1 / len(micro)
        loss = loss + summed / number * weight + weight * (BALANCE * balance + Z * z + OWN * own)
        values += weight * torch.stack([balance, z, own]).detach()
    loss.backward()
    optimizer.step()
    return values.tolist(), model


class _CausalLM(CausalLM):
    def configure_model(self) -> None:
        if self.model is None:
            self.model = tiny_model(output_router_logits=True, router_aux_loss_coef=OWN)


class _OwnModule(L.LightningModule):
    """A mean of its own: of the tokens of this rank's micro-batch, which all have as many."""

    router_rules = RULES

    def configure_model(self) -> None:
        self.model = tiny_model(output_router_logits=True, router_aux_loss_coef=OWN)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.model(**self.trainer.strategy.shard_sequence(batch))  # type: ignore[attr-defined]
        return output.loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit(root: Path, own: bool, accumulate: int, layout: dict[str, Any]) -> list[str]:
    strategy = ExpertParallelStrategy(**layout)
    trainer = quiet(
        root, strategy=strategy, max_steps=1, accumulate_grad_batches=accumulate, use_distributed_sampler=False,
        log_every_n_steps=1,
    )  # fmt: skip
    ranks = strategy.data_world_size
    data = padded_batches(accumulate * ranks)
    if own:
        for batch in data:
            batch["attention_mask"] = (torch.arange(11)[None] < torch.tensor([[7], [9]])).long()
            batch["labels"] = batch["input_ids"].where(batch["attention_mask"].bool(), -100)
    windows = [data[index * ranks : (index + 1) * ranks] for index in range(accumulate)]
    values, expected = _one_process(windows, weigh=not own)
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    config = tiny_model().config
    module = _OwnModule() if own else _CausalLM(config, pretrained=False, optimizer=sgd, router=RULES)
    mine = [window[strategy.layout.data_rank(int(os.environ["RANK"]))] for window in windows]
    trainer.fit(module, DataLoader(mine, batch_size=None))  # type: ignore[arg-type]
    wrong = []
    for (name, found), wanted in zip(module.model.named_parameters(), expected.parameters(), strict=True):
        before = dict(tiny_model().named_parameters())[name].double()
        moved = found.full_tensor().double().cpu() - before
        if not (error := relative_error(moved, wanted.detach() - before)) <= 2e-4:
            wrong.append(f"{name}: {error:.1e}")
    for name, value in zip(("router_balance", "router_z", "router_aux"), values, strict=True):
        logged = trainer.logged_metrics[f"train/{name}"].item()
        if not abs(logged - value) <= 1e-5 * abs(value):
            wrong.append(f"{name}: {logged} in place of {value}")
    return wrong


def _run(root: Path, layout: dict[str, Any], cases: list[tuple[bool, int]]) -> list[str]:
    return [f"{case}: {found}" for case in cases for found in _fit(root, *case, layout)]


@pytest.mark.parametrize(
    ("world", "layout", "cases"),
    [
        (1, {"ep": 1}, [(False, 1)]),
        (2, {"ep": 2}, [(False, 1), (False, 2), (True, 1), (True, 2)]),
        (2, {"ep": 2, "activation_checkpointing": "full"}, [(False, 2)]),
        (2, {"ep": 1, "activation_checkpointing": "selective"}, [(False, 1)]),
        (2, {"ep": 2, "tp": 2}, [(False, 2), (True, 1)]),
        (2, {"ep": 2, "cp": 2}, [(False, 2), (True, 1)]),
        pytest.param(4, {"ep": 4}, [(False, 2)], marks=_MARKS),
        pytest.param(4, {"ep": 4, "tp": 2, "cp": 2}, [(False, 2)], marks=_MARKS),
        pytest.param(2, {"ep": 2, "compile": True}, [(False, 1)], marks=_MARKS),
    ],
)
def test_a_step_follows_the_losses_of_the_global_micro_batches(
    world: int, layout: dict[str, Any], cases: list[tuple[bool, int]], tmp_path: Path
) -> None:
    assert_ranks_agree(world, _run, tmp_path, layout, cases, init_process_group=False, timeout=300)


def _own_loop() -> list[str]:
    """As `_OwnModule`, without a Trainer."""
    rank, world = dist.get_rank(), dist.get_world_size()
    data = batches(world, 2, 11)
    for batch in data:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    values, expected = _one_process([data], weigh=False)
    model = tiny_model(output_router_logits=True, router_aux_loss_coef=OWN)
    steer_routers(model, RULES)
    parallelize(model, ParallelLayout.resolve(2, "auto", world, world), device())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(**here(data[rank])).loss / world
    (loss + router_losses(model, device()).float()).backward()
    logged = step_routers(model, device())
    optimizer.step()
    found = [float(value) for value in logged.values()]
    wrong = [f"{logged} and not {values}"] if found != pytest.approx(values, rel=1e-5) else []
    before = dict(tiny_model().named_parameters())
    for (name, param), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        moved = param.full_tensor().double().cpu() - before[name]
        if not relative_error(moved, wanted - before[name]) <= 2e-4:
            wrong.append(name)
    return wrong


def test_a_loop_of_ones_own_follows_them_too() -> None:
    assert_ranks_agree(2, _own_loop)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "probabilities"])
def test_sums_of_a_layer_keep_its_logits_alone_and_are_those_of_autograd(scoring: Any) -> None:
    kept: list[Tensor] = []
    logits_TE = torch.rand(6, 8, dtype=torch.float64, requires_grad=True)
    counted_T = torch.tensor([True, True, False, True, False, True])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        sums_S = sums_of_layer(logits_TE, counted_T, scoring)
    assert [x.data_ptr() for x in kept] == [logits_TE.data_ptr()]
    rows_TE = logits_TE[counted_T]
    expected = {"softmax": rows_TE.softmax(1), "sigmoid": F.normalize(rows_TE.sigmoid(), p=1, dim=1)}
    assert torch.allclose(sums_S[:8], expected.get(scoring, rows_TE).sum(0))
    if scoring != "probabilities":
        assert torch.allclose(sums_S[8], rows_TE.logsumexp(1).square().sum())
    assert torch.autograd.gradcheck(lambda x: sums_of_layer(x, counted_T, scoring), logits_TE)


def test_every_familys_scores_are_known_or_refused() -> None:
    known = {
        family: _scoring(family)
        for family in ("qwen3_moe", "mixtral", "gpt_oss", "dots1", "gemma4_text", "inkling_text")
    }
    assert known == {
        "qwen3_moe": "softmax", "mixtral": "softmax", "gpt_oss": "softmax", "dots1": "sigmoid",
        "gemma4_text": "probabilities", "inkling_text": None,
    }  # fmt: skip


def _scoring(family: str) -> str | None:
    config = tiny_config_of(family)
    with torch.device("meta"):
        model = auto_class_of(config).from_config(config)
    (found,) = {adapter.router_scoring(layer.router) for layer in moe_layers(model) if layer.router is not None}
    return found


@pytest.mark.parametrize("family", ["minimax_m2", "ernie4_5_moe", "qwen3_moe"])
def test_a_models_own_loss_is_transformers_whatever_its_routers_do(family: str) -> None:
    """Sigmoids and biases decide who is chosen; that loss is of a softmax and of its largest."""
    config = tiny_config_of(family)
    config.output_router_logits, config.router_aux_loss_coef = True, OWN
    model = auto_class_of(config).from_config(config).eval()
    layers = moe_layers(model)
    for layer in layers:
        layer.router.weight.data.normal_()
        if (bias := adapter.correction_bias(layer.router, layer.block)) is not None:
            bias.data.normal_()
    batch = padded_batches(1)[0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = OWN * model(**inputs).aux_loss
    weights = [layer.router.weight for layer in layers]
    wanted = torch.autograd.grad(expected, weights)
    steer_routers(model)
    for steering in steerings(model):
        steering.begin()
    assert model(**inputs).get("aux_loss") is None
    found = router_losses(model, torch.device("cpu"))
    assert relative_error(found.float(), expected) < 1e-6
    for one, other in zip(torch.autograd.grad(found, weights), wanted, strict=True):
        assert relative_error(one, other) < 1e-5


def test_a_frozen_teacher_is_not_steered_and_two_models_have_names() -> None:
    student, teacher = tiny_model(), tiny_model().requires_grad_(False)
    module = nn.ModuleDict({"student": student, "teacher": teacher})
    steer_routers(module, [RouterZLoss(Z), BiasUpdates(0.1)])
    assert [steering.name for steering in steerings(module)] == ["student"]
    assert not any("bias" in name for name, _ in teacher.named_buffers())
    ids = batches(1, 2)[0]["input_ids"]
    both = nn.ModuleDict({"one": student, "other": teacher.requires_grad_(True)})
    steer_routers(both, RouterZLoss(Z))
    for steering in steerings(both):
        steering.begin()
    student(ids)
    teacher(ids[:, :5])
    router_losses(both, ids.device)
    values = step_routers(both, ids.device)
    assert set(values) == {"router_z/one", "router_z/other"}
    assert values["router_z/one"] != values["router_z/other"]


def test_losses_of_routers_whose_scores_are_not_known_are_refused() -> None:
    config = tiny_config_of("inkling_text")
    with torch.device("meta"):
        model = auto_class_of(config).from_config(config)
    with pytest.raises(ValueError, match=r"BalancingLoss.*it is not known how its router .* Use BiasUpdates"):
        steer_routers(model, BalancingLoss())
    config = tiny_config_of("gemma4_text")
    with torch.device("meta"):
        model = auto_class_of(config).from_config(config)
    with pytest.raises(ValueError, match="RouterZLoss"):
        steer_routers(model, RouterZLoss())


def _fits_frozen(root: Path) -> list[str]:
    module = CausalLM(tiny_model().config, pretrained=False, freeze_router=True, router=BalancingLoss(1.0))
    trainer = quiet(root, strategy=ExpertParallelStrategy(ep=2), max_steps=2)
    module.on_fit_start = lambda: before.update(_weights(module))  # type: ignore[method-assign]
    before: dict[str, Tensor] = {}
    trainer.fit(module, DataLoader(padded_batches(2), batch_size=None))  # type: ignore[arg-type]
    after = _weights(module)
    return [name for name in before if torch.equal(before[name], after[name]) != name.endswith("gate.weight")]


def _weights(module: Any) -> dict[str, Tensor]:
    return {name: param.full_tensor().detach().cpu().clone() for name, param in module.named_parameters()}


def test_a_frozen_router_stays_and_all_else_is_trained(tmp_path: Path) -> None:
    assert_ranks_agree(2, _fits_frozen, tmp_path, init_process_group=False)
