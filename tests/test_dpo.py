"""DPO trains like its formula in float64 on one process, with PEFT's adapters and plain transformers' logits."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM

from lightning_ep import DPO, ExpertParallelStrategy, LoRA
from lightning_ep import loss as loss_module
from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.data import PreferenceDataModule
from lightning_ep.transformers_adapter import recall
from tests.parity import Batches, _adapted, as_peft, lora_like_peft
from tests.rank_process import on_cuda
from tests.ranks import assert_ranks_agree, run_ranks
from tests.reference import VOCAB, adapted_by_peft, relative_error, tiny_model
from tests.talking import write_talking
from tests.tiny import quiet

BETA, LR, STEPS, PAIRS, LENGTH = 0.3, 0.5, 2, 2, 12
DEFAULT_BETA = 0.1
LOGGED = ("train/loss", "train/reward_chosen", "train/reward_rejected", "train/reward_margin", "train/reward_accuracy")


def _batches(num: int) -> list[dict[str, Tensor]]:
    """Pairs that begin alike, with answers of several lengths and padding behind them; two and one in turns."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(num):
        pairs = PAIRS - index % 2
        ids = torch.randint(1, VOCAB, (2 * pairs, LENGTH), generator=generator)
        ids[pairs:, :4] = ids[:pairs, :4]
        labels = ids.clone()
        labels[:, :4] = -100
        for row in range(2 * pairs):
            end = 6 + (index + 2 * row) % 7
            ids[row, end:], labels[row, end:] = 0, -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def _log_probs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    found = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (found * (targets >= 0)).sum(1)


def _reference(windows: list[list[dict[str, Tensor]]], where: str) -> dict[str, Any]:
    """Gradients of the first step, weights after the last and metrics of each, in float64 by the formula."""
    model: Any = adapted_by_peft(tiny_model(), where).double()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=LR)
    found: dict[str, Any] = {"grads": {}, "logged": []}
    for window in windows:
        rows = []
        for batch in window:
            with torch.no_grad():
                model.disable_adapters()
                before = _log_probs(model, batch)
                model.enable_adapters()
            rewards = BETA * (_log_probs(model, batch) - before)
            chosen, rejected = rewards.chunk(2)
            losses = torch.log1p(torch.exp(rejected - chosen))
            rows.append(torch.stack([losses, chosen, rejected, chosen - rejected, (chosen > rejected).double()]))
        means = torch.cat(rows, 1).mean(1)  # over the pairs, of which batches have different numbers
        optimizer.zero_grad()
        means[0].backward()
        found["grads"] = found["grads"] or {name: p.grad.clone() for name, p in trained.items()}
        found["logged"].append(means.detach().tolist())
        optimizer.step()
    return {**found, "weights": {name: p.detach() for name, p in model.named_parameters()}}


TOLERANCE = 2e-5 if on_cuda() else 1e-5  # log-probabilities are fp32 sums there


class _Seeded(DPO):
    def configure_model(self) -> None:
        if self.model is None:
            self.model = _adapted(tiny_model(), self._adapter)


class _Recorder(L.Callback):
    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.logged: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        if not self.grads:
            trained = [(name, p) for name, p in module.model.named_parameters() if p.requires_grad]
            self.grads = {name: as_peft(name, p.grad.full_tensor()).cpu().clone() for name, p in trained}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        self.logged.append([trainer.callback_metrics[name].item() for name in LOGGED])

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        named = module.model.named_parameters()
        self.weights = {name: as_peft(name, p.detach().full_tensor()).cpu() for name, p in named}


def _windows(ranks: int, accumulate: int) -> list[list[dict[str, Tensor]]]:
    flat, size = _batches(STEPS * ranks * accumulate), ranks * accumulate
    return [flat[i * size : (i + 1) * size] for i in range(STEPS)]


def _trains(layout: dict[str, int], cases: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    wrong: list[str] = []
    for case, reference in zip(cases, expected, strict=True):
        strategy = ExpertParallelStrategy(**layout, **case.get("options", {}))
        recorder = _Recorder()
        trainer = quiet(
            Path("."), strategy=strategy, max_steps=STEPS, callbacks=[recorder], use_distributed_sampler=False,
            accumulate_grad_batches=case["accumulate"], log_every_n_steps=1,
        )  # fmt: skip
        module = _Seeded("", lora_like_peft(case["where"]), BETA, lambda p: torch.optim.SGD(p, lr=LR))
        world, rank = strategy.data_world_size, strategy.data_rank
        windows = _windows(world, case["accumulate"])
        mine = [w[i * world + rank] for w in windows for i in range(case["accumulate"])]
        trainer.fit(module, DataLoader(Batches(mine), batch_size=None))
        head = recall(module.model, loss_module._Head)
        assert head is not None, "the loss did not take the head's place"
        assert head.gives_the_logits, "the loss fell back to all logits"
        for step, (found, means) in enumerate(zip(recorder.logged, reference["logged"], strict=True)):
            wrong += [
                f"{case}: {name} of step {step}: {one} != {other}"
                for name, one, other in zip(LOGGED, found, means, strict=True)
                if not abs(one - other) <= 1e-5 * max(1, abs(other))
            ]
        for what in ("grads", "weights"):
            found = getattr(recorder, what)
            assert found.keys() == reference[what].keys()
            errors = {name: relative_error(found[name].double(), value) for name, value in reference[what].items()}
            too_large = {name: error for name, error in errors.items() if not error <= TOLERANCE}
            wrong += [f"{case}: {what} of {name}: {error:.1e}" for name, error in too_large.items()]
    return wrong


PLAIN = {"where": "both", "accumulate": 1}
WINDOW = {"where": "experts", "accumulate": 2, "options": {"activation_checkpointing": "full"}}
COMPILED = {
    "where": "attention",
    "accumulate": 2,
    "options": {"compile": True, "activation_checkpointing": "selective"},
}


def _assert_trains(world: int, layout: dict[str, int], cases: list[dict[str, Any]], timeout: float = 90) -> None:
    ranks = world // layout.get("tp", 1)
    expected = [_reference(_windows(ranks, case["accumulate"]), case["where"]) for case in cases]
    for reference in expected:
        assert abs(reference["logged"][0][3]) > 1e-2, "margins must not be zero"
        assert reference["logged"][1] != reference["logged"][0]
    assert_ranks_agree(world, _trains, layout, cases, expected, init_process_group=False, timeout=timeout)


@pytest.mark.parametrize(("world", "layout"), [(1, {"ep": 1}), (2, {"ep": 2})])
def test_training_equals_the_formula(world: int, layout: dict[str, int]) -> None:
    _assert_trains(world, layout, [PLAIN, WINDOW])


@pytest.mark.slow
@pytest.mark.timeout(330)  # that of the ranks must come first
@pytest.mark.parametrize(("world", "layout"), [(1, {"ep": 1}), (2, {"ep": 1}), (2, {"ep": 2, "tp": 2}), (4, {"ep": 2})])
def test_training_equals_the_formula_on_every_layout(world: int, layout: dict[str, int]) -> None:
    _assert_trains(world, layout, [PLAIN, WINDOW, COMPILED], timeout=300)


# ---------------------------------------------------------------------------------------------- with data, and refusals


def _data(root: Path, rows: int = 12) -> PreferenceDataModule:
    file = root / "pairs.jsonl"
    if not file.exists():
        pairs = ({"prompt": f"eta {i}", "chosen": "zeta eta", "rejected": "theta theta"} for i in range(rows))
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return PreferenceDataModule(
        str(file), sequence_length=40, batch_size=1, validation_fraction=0.4, num_proc=1, cache_dir=str(root / "cache")
    )


def _module(root: Path, **options: Any) -> DPO:
    optimizer = lambda params: torch.optim.AdamW(params, lr=1e-2)  # noqa: E731
    return DPO(str(root / "hub"), LoRA(r=4), optimizer=optimizer, **options)


def _prefers(root: Path) -> dict[str, float]:
    trainer = quiet(
        root, max_steps=8, callbacks=[HuggingFaceExport(str(root / "out"))], num_sanity_val_steps=0,
        check_val_every_n_epoch=None, val_check_interval=4, strategy=ExpertParallelStrategy(ep=2),
        limit_train_batches=4,
    )  # fmt: skip
    module, data = _module(root), _data(root)
    before = trainer.validate(module, data, verbose=False)[0]
    trainer.fit(module, data)
    after = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return {"before": before["val/reward_margin"], "loss before": before["val/loss"], **after}


def test_an_adapter_learns_to_prefer_and_comes_out(tmp_path: Path) -> None:
    write_talking(tmp_path / "hub")
    _data(tmp_path)
    by_rank = run_ranks(2, _prefers, tmp_path, init_process_group=False)
    for found in by_rank:
        assert found["before"] == 0, "B is zero: the model is its reference"
        assert found["loss before"] == pytest.approx(math.log(2))
        assert found["val/reward_margin"] > 0.1
        assert found["val/reward_accuracy"] == found["train/reward_accuracy"] == 1
        assert found["val/loss"] < math.log(2)
        assert found["train/reward_chosen"] > found["train/reward_rejected"]
        assert found["train/grad_norm"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    adapted: Any = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    data = _data(tmp_path)
    data._tokenizer_source = str(tmp_path / "hub")
    data.prepare_data()
    data.setup()
    loader: Any = data.val_dataloader()
    margins: list[float] = []
    with torch.no_grad():
        for batch in loader:
            with adapted.disable_adapter():
                before = _log_probs(adapted, batch)
            chosen, rejected = (_log_probs(adapted, batch) - before).chunk(2)
            assert (chosen > rejected).all(), "plain transformers with PEFT's file prefer what was chosen"
            margins += (chosen - rejected).tolist()
    assert len(margins) % 2, "the ranks cannot share them evenly"
    for found in by_rank:
        mean = DEFAULT_BETA * sum(margins) / len(margins)
        assert found["val/reward_margin"] == pytest.approx(mean, rel=1e-5), "validation sees every pair once"


class _OnOneRank(IterableDataset):
    """Batches of the first rank alone, of which the other does not know."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from _batches(2 if os.environ["RANK"] == "0" else 0)


def _without_a_batch(root: Path) -> dict[str, float]:
    trainer, train = quiet(root, max_epochs=1), DataLoader(Batches(_batches(2)), batch_size=None)
    with pytest.raises(ValueError, match="No rank took a val batch"):
        trainer.fit(_module(root), train, DataLoader(_OnOneRank(), batch_size=None))
    return dict(trainer.callback_metrics)


def test_a_validation_without_a_batch_is_no_number(tmp_path: Path) -> None:
    write_talking(tmp_path / "hub")
    for metrics in run_ranks(2, _without_a_batch, tmp_path, init_process_group=False):
        assert "val/loss" not in metrics
        assert "train/loss" in metrics, "the sanity check only warns"


def _refusals(root: Path) -> list[str]:
    wrong = []
    for options, config, message in (
        ({"ep": 2, "cp": 2}, {}, "cp=2 gives every rank a piece"),
        ({"ep": 2}, {"output_router_logits": True}, "asks for a balancing loss"),
    ):
        file = root / "hub" / "config.json"
        text = file.read_text()
        if config and os.environ["RANK"] == "0":
            file.write_text(json.dumps({**json.loads(text), **config}))
        trainer = quiet(root, max_steps=1, strategy=ExpertParallelStrategy(**options))
        try:
            trainer.fit(_module(root), DataLoader(Batches(_batches(2)), batch_size=None))
        except ValueError as error:
            if message not in str(error):
                wrong.append(f"{error}")
        else:
            wrong.append(f"{options} is accepted")
    return wrong


def test_what_it_cannot_do_is_refused_when_the_model_is_built(tmp_path: Path) -> None:
    write_talking(tmp_path / "hub")
    assert_ranks_agree(2, _refusals, tmp_path, init_process_group=False)
    with pytest.raises(ValueError, match=r"beta=0\) must be positive"):
        DPO("model", LoRA(), beta=0)
