"""What steers one model is shared by its ranks: metrics that decide, optimizers' settings, steps that are left out."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ep import AdamW, CausalLM, ExpertParallelStrategy
from lightning_ep.routing import BiasUpdates
from tests.reference import tiny_config, tiny_model
from tests.rows import RowFailures, Rows, agreed, refused, whole
from tests.tiny import SMALL, Samples, TinyModule, loader, mean_loss, quiet

row = Rows()


class Unsynced(TinyModule):
    """Logs what only its rank has seen, the usual line without `sync_dist`."""

    plateau: dict[str, Any] | None = None

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("mine", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        if self.plateau is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.plateau}}


def _steps_until_refused(root: Path, module: L.LightningModule, *words: str, **flags: Any) -> int:
    trainer = quiet(root, **{"max_epochs": 3, "num_sanity_val_steps": 0, **flags})
    with refused("rank 0", "rank 1", *words):
        trainer.fit(module, loader(), loader(4, first=100))
    return trainer.global_step


@row()
def a_monitor_is_compared_in_the_sanity_check(root: Path) -> None:
    for callback in (EarlyStopping("mine"), ModelCheckpoint(root, monitor="mine")):
        steps = _steps_until_refused(
            root, Unsynced(), "'mine' is monitored", "sync_dist=True", callbacks=[callback], num_sanity_val_steps=1
        )
        assert steps == 0
        assert not {"_run_early_stopping_check", "_monitor_candidates"} & set(vars(callback)), "not as it was before"


@row()
def a_monitor_is_compared_before_it_decides(root: Path) -> None:
    steps = _steps_until_refused(root, Unsynced(), "'mine'", "sync_dist=True", callbacks=[EarlyStopping("mine")])
    assert steps == 4
    steps = _steps_until_refused(
        root, Unsynced(), "'train_loss'", callbacks=[ModelCheckpoint(root, monitor="train_loss", every_n_train_steps=2)]
    )
    assert steps == 2
    module = Unsynced()
    module.plateau = {"monitor": "mine"}
    assert _steps_until_refused(root, module, "'mine'", "sync_dist=True") == 4
    module = Unsynced()
    module.plateau = {"monitor": "train_loss", "interval": "step"}
    assert _steps_until_refused(root, module, "'train_loss'", "sync_dist=True") == 1


@row()
def a_monitor_logged_at_the_end_of_the_epoch_by_the_module(root: Path) -> None:
    class AtTheEnd(TinyModule):
        def on_train_epoch_end(self) -> None:
            self.log("mine", float(self.global_rank))

    stop = EarlyStopping("mine", check_on_train_epoch_end=True)
    assert _steps_until_refused(root, AtTheEnd(), "'mine'", callbacks=[stop]) == 4


@row()
def a_monitor_of_one_rank_only(root: Path) -> None:
    class OnOne(TinyModule):
        def on_validation_epoch_end(self) -> None:
            if self.global_rank == 0:
                self.log("mine", 1.0)

    _steps_until_refused(root, OnOne(), "'mine'", "not logged on rank 1", callbacks=[EarlyStopping("mine")])


class _Clocks(L.Callback):
    """It is time for a validation in every step on rank 0, and never on rank 1."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer._last_val_time = float("inf") if trainer.global_rank else -float("inf")  # type: ignore[attr-defined]


@row()
def a_validation_by_the_clock_begins_on_all_ranks(root: Path) -> None:
    validated = []

    class Validated(TinyModule):
        def on_validation_start(self) -> None:
            validated.append(self.trainer.global_step)

    flags: dict[str, Any] = {"val_check_interval": "00:00:00:01", "check_val_every_n_epoch": None}
    trainer = quiet(root, callbacks=[_Clocks()], max_steps=3, num_sanity_val_steps=0, **flags)
    trainer.fit(Validated(), loader(), loader(4, first=100))
    assert validated == [1, 2, 3]
    assert "_should_check_val_fx" not in vars(trainer.fit_loop.epoch_loop), "not as it was before"


@row()
def shared_monitors_decide(root: Path) -> None:
    keep = ModelCheckpoint(root, monitor="val_loss", save_top_k=1)
    stop = EarlyStopping("val_loss", patience=0, min_delta=1e9)
    trainer = quiet(root, callbacks=[stop, keep], max_epochs=3)
    trainer.fit(TinyModule(), loader(), loader(4))
    assert trainer.global_step == 8
    assert Path(keep.best_model_path).is_dir()


@row()
def a_checkpoint_is_named_by_rank_0(root: Path) -> None:
    """By a metric that decides nothing, and that ranks do not share."""
    keep = ModelCheckpoint(root, filename="{step}-{train_loss:.6f}")
    module = TinyModule()
    trainer = quiet(root, callbacks=[keep], max_epochs=1)
    trainer.fit(module, loader(), loader(4))
    assert not agreed(f"{module.losses[-1]:.6f}"), "ranks share the metric: nothing is shown"
    assert agreed(keep.best_model_path)
    assert [path.name for path in root.iterdir()] == [Path(keep.best_model_path).name]
    trainer.validate(TinyModule(), loader(4), ckpt_path="best")


@row()
def a_setting_that_a_rank_changes_alone(root: Path) -> None:
    class Alone(TinyModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_rank == 1 and batch_idx == 1:
                self.optimizers().param_groups[0][name] = 0.5  # type: ignore[union-attr]

    for name in ("lr", "momentum"):
        steps = _steps_until_refused(root, Alone(), f"{name} of group 0 of SGD is", "0.5 on rank 1", "strategy.reduce")
        assert steps <= 3


@row()
def a_group_that_a_rank_adds_alone(root: Path) -> None:
    class Alone(TinyModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_rank == 1 and batch_idx == 3:
                self.optimizers().add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})  # type: ignore

    _steps_until_refused(root, Alone(), "SGD has 1 groups on rank 0, 2 groups on rank 1", max_epochs=1)


@row()
def a_step_that_a_rank_leaves_out_alone(root: Path) -> None:
    class Alone(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            if self.global_rank == 0 or batch_idx != 1:
                optimizer.step()

    _steps_until_refused(root, Alone(), "number of optimizer steps is 2 on rank 0, 1 on rank 1")


@row()
def a_scheduler_of_all_ranks_changes_settings(root: Path) -> None:
    class Scheduled(TinyModule):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=torch.tensor(0.1), momentum=0.9)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), "interval": "step"}]

    trainer = quiet(root, max_epochs=1)
    trainer.fit(Scheduled(), loader(), loader(4))
    assert trainer.global_step == 4


@row()
def a_mean_over_unequal_numbers_of_samples(root: Path) -> None:
    """8 samples on rank 0 and 7 on rank 1, whose mean is of 15."""
    rank = int(os.environ["RANK"])
    mine = [Samples(15)[index] for index in range(rank, 15, 2)]
    trainer = quiet(root, use_distributed_sampler=False, max_epochs=1, limit_train_batches=0)
    (results,) = trainer.validate(TinyModule(), DataLoader(mine, batch_size=4))  # type: ignore[arg-type]
    expected = mean_loss(tiny_model(**SMALL), 15)
    assert abs(results["val_loss"] - expected) <= 1e-6 * expected, (results, expected)


class Broken(TinyModule):
    """Ends some steps with a gradient that is not finite, on rank 1 alone."""

    def __init__(self, steps: tuple[int, ...], value: float = float("nan"), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.broken, self.value = steps, value
        self.optimizer: Any = None
        self.batches: list[int] = []

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss = super().loss(batch)
        if self.trainer.training and self.global_rank == 1 and len(self.losses) in self.broken:
            loss = loss * self.value
        return loss

    def configure_optimizers(self) -> Any:
        if self.optimizer is not None:
            return self.optimizer(self.parameters())
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def _fit(root: Path, module: L.LightningModule, batches: list[int], skip: int = 2, **flags: Any) -> L.Trainer:
    """Trains on numbered batches of two samples per rank."""
    samples = [Samples(64)[4 * batch + i] for batch in batches for i in range(4)]
    # By the environment: in the first row of a process there is no group yet.
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    data = DataLoader(samples, batch_size=2, sampler=DistributedSampler(samples, world, rank, shuffle=False))  # type: ignore
    strategy = ExpertParallelStrategy(ep=2, skip_nonfinite_steps=skip)
    trainer = quiet(root, strategy=strategy, max_epochs=1, limit_val_batches=0, **flags)
    trainer.fit(module, data)
    return trainer


def _equal(one: Any, other: Any) -> None:
    for (name, mine), theirs in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(whole(mine), whole(theirs)), name


@row()
def a_step_without_a_finite_norm_is_left_out(root: Path) -> None:
    """As if its batches had not been there: with and without clipping, of all kinds, for every optimizer."""
    cases: list[tuple[dict[str, Any], Any, float]] = [
        ({}, None, float("nan")),
        ({"gradient_clip_val": 0.1}, None, float("inf")),
        ({"gradient_clip_val": 0.1}, lambda params: AdamW(params, lr=0.01), float("nan")),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, None, float("inf")),
    ]
    for flags, optimizer, value in cases:
        broken, whole_ = Broken((1, 3), value), Broken(())
        broken.optimizer = whole_.optimizer = optimizer
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = _fit(root, broken, [0, 1, 2, 3, 4], **flags)
        assert trainer.strategy.skipped_steps == 2  # type: ignore[attr-defined]
        said = [str(w.message) for w in caught if "was left out" in str(w.message)]
        assert len(said) == (2 if broken.global_rank == 0 else 0), said
        _fit(root, whole_, [0, 2, 4], **flags)
        _equal(broken, whole_)


@row()
def a_step_is_left_out_beside_a_zero_grad_of_ones_own(root: Path) -> None:
    """What it was to be clipped by, no number, must not wait for the next step."""

    class Own(Broken):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            for param in self.parameters():
                param.grad = None

    broken, whole_ = Own((1, 3)), Own(())
    broken.optimizer = whole_.optimizer = lambda params: AdamW(params, lr=0.01)
    _fit(root, broken, [0, 1, 2, 3, 4], gradient_clip_val=0.1)
    _fit(root, whole_, [0, 2, 4], gradient_clip_val=0.1)
    _equal(broken, whole_)


@row()
def a_window_with_one_broken_batch_is_left_out(root: Path) -> None:
    broken, whole_ = Broken((2,)), Broken(())
    _fit(root, broken, [0, 1, 2, 3, 4, 5], accumulate_grad_batches=2)
    _fit(root, whole_, [0, 1, 4, 5], accumulate_grad_batches=2)
    _equal(broken, whole_)


class ManualBroken(Broken):
    def __init__(self, steps: tuple[int, ...]) -> None:
        super().__init__(steps)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(super().training_step(batch, batch_idx))
        self.trainer.strategy.clip_grad_norm_(max_norm=0.1)  # type: ignore[attr-defined]
        optimizer.step()  # type: ignore[union-attr]


@row()
def a_manual_step_is_left_out(root: Path) -> None:
    broken, whole_ = ManualBroken((1,)), ManualBroken(())
    _fit(root, broken, [0, 1, 2])
    _fit(root, whole_, [0, 2])
    _equal(broken, whole_)


@row()
def a_manual_step_of_one_of_two_optimizers_is_left_out(root: Path) -> None:
    """Clipped by value, which makes an infinite gradient finite."""

    class Two(Broken):
        def __init__(self, steps: tuple[int, ...], skipped: tuple[int, ...]) -> None:
            super().__init__(steps)
            self.automatic_optimization = False
            self.skipped = skipped

        def configure_optimizers(self) -> Any:
            head = list(self.model.lm_head.parameters())
            rest = [param for name, param in self.named_parameters() if "lm_head" not in name]
            return [torch.optim.SGD(params, lr=self.lr) for params in (head, rest)]

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
            loss = TinyModule.loss(self, batch)
            self.manual_backward(loss)
            if batch_idx in self.broken:
                self.model.lm_head.weight.grad.mul_(float("inf"))
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                self.clip_gradients(optimizer, 0.01, "value")
            for number, optimizer in enumerate(self.optimizers()):  # type: ignore[arg-type]
                if number == 1 or batch_idx not in self.skipped:
                    optimizer.step()

    broken, whole_ = Two((1,), ()), Two((), (1,))
    trainer = _fit(root, broken, [0, 1, 2])
    assert trainer.strategy.skipped_steps == 1  # type: ignore[attr-defined]
    _fit(root, whole_, [0, 1, 2])
    _equal(broken, whole_)


@row()
def steps_are_not_left_out_for_ever(root: Path) -> None:
    module = Broken((0, 1, 3, 4, 5, 6))
    with refused("gradient norm of step 5 is nan", "2 steps in a row", "skip_nonfinite_steps=2", "learning rate"):
        _fit(root, module, list(range(8)))
    module = Broken((1,))
    _fit(root, module, [0, 1, 2], skip=0)
    assert whole(module.model.lm_head.weight).isnan().any(), "without the option nothing is left out"


@row()
def causal_lm_leaves_steps_out_and_counts_them(root: Path) -> None:
    class BrokenLM(CausalLM):
        def __init__(self, steps: tuple[int, ...]) -> None:
            sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
            super().__init__(tiny_config(**SMALL), False, sgd, router=BiasUpdates(0.01))
            self.broken, self.count = steps, 0

        def configure_model(self) -> None:
            self.model = tiny_model(**SMALL) if self.model is None else self.model

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step({name: batch[name] for name in ("input_ids", "labels")}, batch_idx)
            self.count += 1
            return loss * float("nan") if self.global_rank == 0 and self.count - 1 in self.broken else loss

    broken, whole_ = BrokenLM((1,)), BrokenLM(())
    trainer = _fit(root, broken, [0, 1, 2], gradient_clip_val=0.1)
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    _fit(root, whole_, [0, 2], gradient_clip_val=0.1)
    _equal(broken, whole_)
    biases, expected = (module.model.model.layers[0].mlp.gate.e_score_correction_bias for module in (broken, whole_))
    assert expected.any(), "routers of the reference are not steered"
    assert torch.equal(biases, expected)
    assert broken.trainer.callback_metrics["train/router_bias"] == expected.abs().max()


@row()
def a_limit_that_is_no_number_of_steps(root: Path) -> None:
    for limit in (-1, 1.5, True, "3"):
        with refused("skip_nonfinite_steps=", "how many steps"):
            quiet(root, strategy=ExpertParallelStrategy(ep=2, skip_nonfinite_steps=limit))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", row)
def test_works_or_is_refused(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
