"""Programs of users that are resumed, in two ranks: they go on as if nothing had been, or are told what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint

from lightning_ep import ExpertParallelStrategy
from lightning_ep.hub.errors import CheckpointError
from tests.rows import RowFailures, Rows
from tests.tiny import TinyModule, loader, quiet

row = Rows()


def _keep(root: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(root, filename="{epoch}-{step}", save_top_k=-1, **options)


# ---------------------------------------------------------------------------------------------------- groups


class _Thaw(BaseFinetuning):
    """Trains the head alone, and from epoch 1 on the layers, too, in a group of their own."""

    def freeze_before_training(self, module: Any) -> None:
        module.model.model.requires_grad_(False)

    def finetune_function(self, module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        layers = list(module.model.model.layers.parameters())
        if epoch >= 1:
            for param in layers:
                param.requires_grad_(True)
        if epoch == 1:
            optimizer.add_param_group({"params": layers, "lr": 0.01})


class _AddsInFitStart(L.Callback):
    """The same by hand."""

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        trainer.optimizers[0].add_param_group({"params": list(module.model.model.layers.parameters()), "lr": 0.01})


class _HeadFirst(TinyModule):
    def __init__(self) -> None:
        super().__init__(in_init=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.model.lm_head.parameters(), lr=0.05)


def _groups(trainer: L.Trainer) -> list[tuple[int, float]]:
    return [(len(group["params"]), group["lr"]) for group in trainer.optimizers[0].param_groups]


@row()
def groups_that_a_callback_has_added(root: Path) -> None:
    _goes_on(root, [(_Thaw, {}), (_AddsInFitStart, {})])


@row(slow=True)
def groups_that_a_callback_has_added_in_every_checkpoint(root: Path) -> None:
    _goes_on(root, [(_Thaw, {"async_save": True}), (_Thaw, {"save_distributed_checkpoint": False})])


def _goes_on(root: Path, cases: list[tuple[Any, dict[str, Any]]]) -> None:
    flags: dict[str, Any] = {"max_epochs": 4, "num_sanity_val_steps": 0}
    for number, (callback, options) in enumerate(cases):
        path = root / str(number)
        strategy = ExpertParallelStrategy(ep=2, **options)
        whole = quiet(path, strategy=strategy, callbacks=[callback(), _keep(path)], **flags)
        whole.fit(straight := _HeadFirst(), loader())
        assert len(whole.optimizers[0].param_groups) == 2
        for ep in (2,) if number else (2, 1):  # and on another layout
            rest = quiet(path, strategy=ExpertParallelStrategy(ep=ep), callbacks=[callback()], **flags)
            rest.fit(resumed := _HeadFirst(), loader(), ckpt_path=path / "epoch=1-step=8.ckpt")
            assert _groups(rest) == _groups(whole), (callback, options)
            assert len(resumed.losses) == 8
            tolerance = 0 if ep == 2 else 1e-4
            assert resumed.losses == pytest.approx(straight.losses[8:], rel=tolerance, abs=0), (callback, options, ep)


@row()
def groups_that_come_too_late_are_named(root: Path) -> None:
    class Late(_AddsInFitStart):
        def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
            pass

        def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
            super().on_fit_start(trainer, module)

    for distributed in (True, False):
        trainer = quiet(
            root,
            strategy=ExpertParallelStrategy(ep=2, save_distributed_checkpoint=distributed),
            max_steps=1,
            callbacks=[Late()],
        )
        trainer.fit(_HeadFirst(), loader())
        trainer.save_checkpoint(root / f"{distributed}.ckpt")
        with pytest.raises(CheckpointError, match="add them in it, as Lightning's BaseFinetuning"):
            quiet(root, max_steps=2, callbacks=[Late()]).fit(
                _HeadFirst(), loader(), ckpt_path=root / f"{distributed}.ckpt"
            )


# ---------------------------------------------------------------------------------------------------- classes


class _Optimized(TinyModule):
    """With an optimizer and a scheduler of the test's choice."""

    def __init__(self, optimizer: Any, scheduler: Any = None) -> None:
        super().__init__()
        self.optimizer, self.scheduler = optimizer, scheduler

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])


def _sgd(**options: Any) -> Any:
    return lambda params: torch.optim.SGD(params, **{"lr": 0.1, **options})


def _adamw(**options: Any) -> Any:
    return lambda params: torch.optim.AdamW(params, **{"lr": 0.01, **options})


def _cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)


def _lambda(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def _resumed(root: Path, saved: _Optimized, resumed: _Optimized, distributed: bool) -> L.Trainer:
    trainer = quiet(root, strategy=ExpertParallelStrategy(ep=2, save_distributed_checkpoint=distributed), max_steps=2)
    trainer.fit(saved, loader())
    trainer.save_checkpoint(root / "saved.ckpt")
    rest = quiet(root, max_steps=4)
    rest.fit(resumed, loader(), ckpt_path=root / "saved.ckpt")
    return rest


@row()
def another_class_is_refused_by_name(root: Path) -> None:
    cases = {
        "SGD .torch.optim.sgd.SGD.*has torch.optim.adamw.AdamW.*betas.*return SGD": (
            _Optimized(_sgd()),
            _Optimized(_adamw()),
        ),
        "AdamW .*in place of.*momentum.*return AdamW from": (_Optimized(_adamw()), _Optimized(_sgd(momentum=0.9))),
        "optimizer AdamW .*has torch.optim.adam.Adam[.]": (
            _Optimized(_adamw()),
            _Optimized(lambda params: torch.optim.Adam(params)),
        ),
        "scheduler CosineAnnealingLR.*LambdaLR.*return CosineAnnealingLR": (
            _Optimized(_sgd(), _cosine),
            _Optimized(_sgd(), _lambda),
        ),
    }
    for distributed in (True, False):
        for message, (saved, resumed) in cases.items():
            with pytest.raises(CheckpointError, match=f"(?s){message}"):
                _resumed(root / str(distributed), _copy(saved), _copy(resumed), distributed)


def _copy(module: _Optimized) -> _Optimized:
    return _Optimized(module.optimizer, module.scheduler)


@row()
def another_way_to_compute_is_this_runs(root: Path) -> None:
    for distributed in (True, False):
        trainer = _resumed(
            root / str(distributed), _Optimized(_adamw(foreach=True)), _Optimized(_adamw(fused=True)), distributed
        )
        group = trainer.optimizers[0].param_groups[0]
        assert (group["foreach"], group["fused"]) == (None, True)


@row()
def other_hyperparameters_are_named(root: Path) -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        _resumed(root, _Optimized(_sgd()), _Optimized(_sgd(lr=0.2, weight_decay=0.1)), True)
        return
    with pytest.warns(UserWarning, match=r"SGD goes on with .*: lr 0.1 \(not 0.2\); weight_decay 0 \(not 0.1\)\. Set"):
        trainer = _resumed(root, _Optimized(_sgd()), _Optimized(_sgd(lr=0.2, weight_decay=0.1)), True)
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0


@row()
def an_optimizer_without_state_and_a_new_scheduler(root: Path) -> None:
    def once(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)

    for distributed in (True, False):
        trainer = _resumed(root / str(distributed), _Optimized(_sgd()), _Optimized(_sgd(), once), distributed)
        assert trainer.global_step == 4


@pytest.mark.parametrize("name", row)
def test_goes_on_or_says_what_differs(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
