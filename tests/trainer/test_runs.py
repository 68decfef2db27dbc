"""Several runs in one process and resumed ones, at ep=2."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import callbacks as builtin
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_ep import CausalLM, ExpertParallelStrategy
from tests.reference import batches, tiny_config, tiny_model
from tests.rows import STEPS, RowFailures, Rows, agreed, check, fit, refused, whole
from tests.tiny import SMALL, Samples, TinyModule, loader, mean_loss, quiet

row = Rows()


@row()
def refit_with_the_same_trainer(root: Path) -> None:
    trainer, module = fit(root, max_steps=STEPS)
    trainer.fit_loop.epoch_loop.max_steps = 2 * STEPS
    trainer.fit(module, loader(), loader(4))
    check(trainer, module, 2 * STEPS)


@row()
def refit_with_a_new_trainer(root: Path) -> None:
    _, module = fit(root)
    before = whole(module.model.lm_head.weight)
    _trainer, _ = fit(root, module)
    after = whole(module.model.lm_head.weight)
    assert not torch.equal(before, after)


@row()
def refit_equals_one_fit(root: Path) -> None:
    flags = {"use_distributed_sampler": False, "limit_val_batches": 0}

    def plain(module: TinyModule) -> TinyModule:
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
        return module

    _, once = fit(root, plain(TinyModule()), max_steps=STEPS, **flags)
    quiet(root, max_steps=1, **flags).fit(twice := plain(TinyModule()), loader())
    quiet(root, max_steps=1, **flags).fit(twice, DataLoader(Samples(4, first=2), batch_size=2))
    for (name, one), two in zip(once.model.named_parameters(), twice.model.parameters(), strict=True):
        assert torch.equal(one.to_local(), two.to_local()), name


@row()
def process_groups_do_not_leak(root: Path) -> None:
    trainer, module = fit(root)
    groups = len(dist.distributed_c10d._world.pg_map)
    for _ in range(2):
        trainer.validate(module, loader(4), verbose=False)
        trainer.fit(module, loader())
    assert len(dist.distributed_c10d._world.pg_map) == groups


@row()
def fit_after_a_fit_that_ended_inside_an_accumulation_window(root: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    class Grab(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
            self.grads = {name: whole(param.grad) for name, param in module.named_parameters()}

    def causal() -> L.LightningModule:
        config = tiny_config(**SMALL)
        return CausalLM(config, pretrained=False, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))

    def gradients(module: L.LightningModule, accumulate: int) -> dict[str, Any]:
        grab = Grab()
        data = DataLoader(batches(4, 2, seed=5), batch_size=None)
        quiet(root, max_steps=1, accumulate_grad_batches=accumulate, callbacks=[grab]).fit(module, data)
        return grab.grads

    for accumulate in (1, 2):
        L.seed_everything(1, verbose=False)
        expected = gradients(causal(), accumulate)
        module = causal()
        stopped = quiet(root, max_steps=9, accumulate_grad_batches=2, callbacks=[Stop()])
        stopped.fit(module, DataLoader(batches(4, 2), batch_size=None))
        assert stopped.global_step == 0
        found = gradients(module, accumulate)
        assert all(torch.equal(found[name], grad) for name, grad in expected.items()), accumulate


class _LeavesEpochs(TinyModule):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == 1 else None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@row()
def an_epoch_that_is_left_inside_an_accumulation_window(root: Path) -> None:
    """Its gradients are set to zero at the beginning of the next window, those that nobody has reduced, too."""
    flags = {"accumulate_grad_batches": 2, "max_epochs": 2, "use_distributed_sampler": False}
    quiet(root, **flags).fit(left := _LeavesEpochs(), loader(4))
    assert len(left.losses) == 3
    quiet(root, **{**flags, "max_epochs": 1}).fit(whole_epoch := TinyModule(), loader(4))
    for (name, param), other in zip(left.named_parameters(), whole_epoch.parameters(), strict=True):
        assert torch.equal(whole(param), whole(other)), name


class _Interrupted(Exception):
    pass


class _Interruptible(TinyModule):
    """As by a key in a notebook, in the middle of the second batch's forward or backward."""

    def __init__(self, where: str = "") -> None:
        super().__init__(num_hidden_layers=2)
        self.where = where

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        def interrupt(*_: Any) -> None:
            raise _Interrupted

        layer, hook = self.model.model.layers[1].mlp, None
        if self.where == "forward" and batch_idx == 1:
            hook = layer.register_forward_hook(interrupt)
        if self.where == "backward" and batch_idx == 1:
            hook = layer.register_full_backward_pre_hook(interrupt)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            if hook is not None:
                hook.remove()


@row()
def fit_after_a_fit_that_raised(root: Path) -> None:
    flags = {"use_distributed_sampler": False, "max_epochs": 1}
    data = list(loader(6))

    def weights(where: str, first: list[Any]) -> dict[str, Any]:
        module = _Interruptible(where)
        with pytest.raises(_Interrupted) if where else nullcontext():
            quiet(root, **flags).fit(module, DataLoader(first, batch_size=None))
        module.where = ""
        quiet(root, **flags).fit(module, DataLoader(data[2:], batch_size=None))
        return {name: whole(param) for name, param in module.model.named_parameters()}

    expected = weights("", data[:1])
    for where in ("forward", "backward"):
        found = weights(where, data)
        assert all(torch.equal(found[name], param) for name, param in expected.items()), where


class _Skips(_Interruptible):
    """Goes on with the next batch, through the module's parameters rather than the optimizer's."""

    automatic_optimization = False

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        try:
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            self.trainer.strategy.clip_grad_norm_(max_norm=0.1)
            self.optimizers().step()
        except _Interrupted:
            loss = torch.zeros(())
        self.zero_grad()
        return loss


@row()
def manual_optimization_goes_on_after_a_batch_that_raised(root: Path) -> None:
    flags = {"use_distributed_sampler": False, "max_epochs": 1}
    data = list(loader(6))
    quiet(root, **flags).fit(expected := _Skips(), DataLoader([data[0], data[2]], batch_size=None))
    for where in ("forward", "backward"):
        quiet(root, **flags).fit(module := _Skips(where), DataLoader(data, batch_size=None))
        for (name, param), other in zip(module.named_parameters(), expected.parameters(), strict=True):
            assert torch.allclose(whole(param), whole(other), rtol=1e-6, atol=1e-8), (where, name)


@row()
def evaluate_before_and_after_fit(root: Path) -> None:
    module = TinyModule()
    trainer = quiet(root, max_steps=STEPS)
    before = trainer.validate(module, loader(4), verbose=False)[0]["val_loss"]
    trainer.test(module, loader(4), verbose=False)
    assert len(trainer.predict(module, loader(4))) == 1
    assert before == pytest.approx(mean_loss(tiny_model(**SMALL), 4), rel=1e-5)
    trainer.fit(module, loader(), loader(4))
    check(trainer, module)
    after = trainer.validate(module, loader(4), verbose=False)[0]["val_loss"]
    assert after != before
    assert agreed(after)
    assert trainer.test(module, loader(4), verbose=False)[0]["test_loss"] == after
    assert len(trainer.predict(module, loader(4))) == 1
    quiet(root).validate(module, loader(4), verbose=False)


def _rank() -> int:
    return int(os.environ["RANK"])  # the group may not be there yet


class _OfTinyModel(CausalLM):
    def __init__(self) -> None:
        super().__init__(tiny_config(**SMALL), pretrained=False)

    def configure_model(self) -> None:
        if self.model is None:
            self.model = tiny_model(**SMALL)


@row()
def evaluation_in_which_some_ranks_and_batches_have_no_target(root: Path) -> None:
    data = batches(4, 2, seed=5)
    # Of rank 0 only the second batch has targets, three of them; of rank 1 none has.
    mine = data[:2] if _rank() == 0 else data[2:]
    for batch in (data[0], *data[2:]):
        batch["labels"] = torch.full_like(batch["labels"], -100)
    data[1]["labels"][0, 4:] = -100
    data[1]["labels"][1] = -100
    module = _OfTinyModel()
    found = quiet(root, use_distributed_sampler=False).validate(
        module, DataLoader(mine, batch_size=None), verbose=False
    )[0]
    with torch.no_grad():
        expected = tiny_model(**SMALL)(**data[1]).loss.item()
    assert found["val/loss"] == pytest.approx(expected, rel=1e-5)


@row()
def logs_of_a_module_with_hooks_of_its_own(root: Path) -> None:
    seen = []

    class OwnStep(_OfTinyModel):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)  # as Lightning's documentation has it

    class OwnClipping(_OfTinyModel):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            super().configure_gradient_clipping(*args, **kwargs)
            seen.append(self.trainer.callback_metrics["train/grad_norm"].item())

    for cls in (_OfTinyModel, OwnStep, OwnClipping):
        trainer = quiet(root, use_distributed_sampler=False, max_steps=2)
        trainer.fit(cls(), DataLoader(batches(2, 2, seed=_rank()), batch_size=None))
        assert {"train/loss", "train/grad_norm", "lr", "loss"} <= set(trainer.callback_metrics), cls
    assert len(seen) == 2


@row()
def evaluation_in_which_no_token_has_a_target(root: Path) -> None:
    def without_targets() -> DataLoader:
        data = batches(2, 2)
        for batch in data:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        return DataLoader(data, batch_size=None)

    for stage in ("val", "test"):
        trainer = quiet(root, use_distributed_sampler=False)
        run = trainer.validate if stage == "val" else trainer.test
        with refused(f"{stage}/loss", "-100", "labels", f"limit_{stage}_batches"):
            run(_OfTinyModel(), without_targets(), verbose=False)
    # The batches of a sanity check may be the only ones without targets: it warns, and what comes later raises.
    trainer = quiet(root, use_distributed_sampler=False, max_steps=1)
    with (
        pytest.warns(UserWarning, match="sanity check.*labels") if _rank() == 0 else nullcontext(),
        refused("val/loss", "in all val batches"),
    ):
        trainer.fit(_OfTinyModel(), DataLoader(batches(1, 2), batch_size=None), without_targets())
    assert trainer.global_step == 1


@row()
def parameters_are_shards_in_every_hook(root: Path) -> None:
    plain: dict[str, list[str]] = {}

    class Watch(L.Callback):
        def look(self, where: str, module: Any) -> None:
            if names := [name for name, param in module.named_parameters() if not isinstance(param, DTensor)]:
                plain[where] = names

        def on_validation_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            self.look("validation", module)

        def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            self.look("before training", module)

        def on_predict_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            self.look("predict", module)

    trainer, module = fit(root, callbacks=[Watch()])
    trainer.predict(module, loader(4))
    assert not plain, plain


@row()
def resume_from_a_directory(root: Path) -> None:
    _resume(root, save_distributed_checkpoint=True)


@row()
def resume_from_a_file(root: Path) -> None:
    _resume(root, save_distributed_checkpoint=False)


def _resume(root: Path, save_distributed_checkpoint: bool, **module_kwargs: Any) -> None:
    def strategy() -> ExpertParallelStrategy:
        return ExpertParallelStrategy(ep=2, save_distributed_checkpoint=save_distributed_checkpoint)

    keep = builtin.ModelCheckpoint(root, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    flags = {"use_distributed_sampler": False, "max_epochs": 2}
    straight = TinyModule()
    quiet(root, strategy=strategy(), callbacks=[keep], **flags).fit(straight, loader(4))
    path = root / "step=2.ckpt"
    assert path.is_dir() is save_distributed_checkpoint
    resumed = TinyModule()
    trainer = quiet(root, strategy=strategy(), **flags)
    trainer.fit(resumed, loader(4), ckpt_path=path)
    check(trainer, resumed, 4)
    assert resumed.losses == straight.losses[2:], (resumed.losses, straight.losses)


@row()
def resume_with_sgd_without_state(root: Path) -> None:
    class Plain(TinyModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer, _ = fit(root, Plain())
    trainer.save_checkpoint(root / "plain.ckpt")
    trainer = quiet(root, max_steps=STEPS + 1)
    trainer.fit(module := Plain(), loader(), ckpt_path=root / "plain.ckpt")
    check(trainer, module, STEPS + 1)


@row()
def resume_from_weights_only_is_refused(root: Path) -> None:
    trainer, _ = fit(root)
    trainer.save_checkpoint(root / "weights.ckpt", weights_only=True)
    with refused("weights", "optimizer", "instead|ckpt_path"):
        quiet(root, max_steps=4).fit(TinyModule(), loader(), ckpt_path=root / "weights.ckpt")


@row()
def train_from_weights_only(root: Path) -> None:
    for distributed in (True, False):
        strategy = ExpertParallelStrategy(ep=2, save_distributed_checkpoint=distributed)
        trainer, _ = fit(root, strategy=strategy)
        path = root / f"weights-{distributed}.ckpt"
        trainer.save_checkpoint(path, weights_only=True)
        expected = {name: whole(param) for name, param in trainer.model.named_parameters()}
        other = quiet(root, max_steps=STEPS)
        other.validate(module := TinyModule(), loader(4), ckpt_path=path, verbose=False)
        for name, param in module.named_parameters():
            assert torch.equal(whole(param), expected[name]), name
        other.fit(module, loader())
        check(other, module, STEPS)
        assert any(not torch.equal(whole(param), expected[name]) for name, param in module.named_parameters())


@row()
def resume_a_file_of_another_strategy(root: Path) -> None:
    fit(root)  # connects the ranks
    if dist.get_rank() == 0:
        # As one process without any parallelism saves it; the tests of layouts read ours in the same way.
        module = TinyModule(in_init=True)
        optimizer = module.configure_optimizers()
        module.loss({"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}).backward()
        optimizer.step()
        state = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()], "lr_schedulers": []}
        progress = quiet(root, strategy="auto", devices=1, accelerator="cpu").fit_loop.state_dict()
        root.mkdir(parents=True, exist_ok=True)
        version = {"pytorch-lightning_version": L.__version__, "epoch": 0, "global_step": 0}
        torch.save({**state, **version, "loops": {"fit_loop": progress}}, root / "other.ckpt")
    dist.barrier()
    trainer = quiet(root, max_steps=STEPS)
    trainer.fit(module := TinyModule(), loader(), ckpt_path=root / "other.ckpt")
    check(trainer, module, STEPS)


@row()
def a_run_leaves_nothing_behind(root: Path) -> None:
    threads = threading.active_count()

    def run() -> list[weakref.ref[Any]]:
        trainer, module = fit(root)
        left = [trainer, trainer.strategy, module, module.model, module.model.lm_head.weight]
        return [weakref.ref(thing) for thing in left]

    left = run()
    gc.collect()
    assert not [type(thing()).__name__ for thing in left if thing() is not None]
    assert threading.active_count() <= threads, threading.enumerate()


class _Frozen(builtin.Callback):
    """Notes how many objects Python's collector passes over; fails in a step, if one is given."""

    def __init__(self, fails_in: int | None = None) -> None:
        self.found: list[int] = []
        self.fails_in = fails_in
        self.cycle: weakref.ref[Any] | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        self.found.append(gc.get_freeze_count())
        if batch[-1] == self.fails_in:
            raise ValueError("on purpose")
        if batch[-1] == 4:  # garbage of later on, which is collected as ever
            made = Samples(1)
            made.itself = made  # type: ignore[attr-defined]
            self.cycle = weakref.ref(made)
            del made
            gc.collect()


_PYTHONS_OWN = 1_000  # objects that 3.12 puts aside by itself in a full pass


@contextmanager
def _nothing_frozen() -> Iterator[None]:
    """As in a process of a user's; what the server of ranks had frozen is frozen again afterwards."""
    gc.unfreeze()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()


@row()
def the_collector_passes_over_what_a_training_has_warmed_up(root: Path) -> None:
    with _nothing_frozen():
        for fails_in in (None, 5):
            look = _Frozen(fails_in)
            with pytest.raises(ValueError, match="on purpose") if fails_in else nullcontext():
                quiet(root, callbacks=[look], max_steps=6).fit(TinyModule(), loader(32))
            assert max(look.found[:4]) <= _PYTHONS_OWN
            assert min(look.found[4:6]) > 10_000
            assert look.cycle is not None
            assert look.cycle() is None
            assert gc.get_freeze_count() == 0


@row()
def what_somebody_else_has_frozen_stays(root: Path) -> None:
    with _nothing_frozen():
        gc.freeze()
        before, look = gc.get_freeze_count(), _Frozen()
        quiet(root, callbacks=[look], max_steps=6).fit(TinyModule(), loader(32))
        for count in (*look.found, gc.get_freeze_count()):  # fewer, where some of them are gone
            assert 0.9 * before < count <= before


@row()
def a_collector_that_is_off_stays_as_it_is(root: Path) -> None:
    with _nothing_frozen():
        gc.disable()
        try:
            look = _Frozen()
            quiet(root, callbacks=[look], max_steps=5).fit(TinyModule(), loader(32))
        finally:
            gc.enable()
    assert look.found == [0] * 5  # not further: a full pass of Python 3.12 puts what lives for ever aside by itself


@row()
def evaluate_a_checkpoint(root: Path) -> None:
    trainer, module = fit(root)
    trainer.save_checkpoint(root / "fitted.ckpt")
    expected = trainer.validate(module, loader(4), verbose=False)[0]["val_loss"]
    for run in ("validate", "test"):
        found = getattr(quiet(root), run)(TinyModule(), loader(4), ckpt_path=root / "fitted.ckpt", verbose=False)
        assert found[0][f"{run[:3] if run == 'validate' else run}_loss"] == expected
    assert quiet(root).predict(TinyModule(), loader(4), ckpt_path=root / "fitted.ckpt")


@row()
def load_a_file_without_a_trainer(root: Path) -> None:
    strategy = ExpertParallelStrategy(ep=2, save_distributed_checkpoint=False)
    trainer, module = fit(root, TinyModule(in_init=True), strategy=strategy)
    trainer.save_checkpoint(root / "file.ckpt")
    loaded = TinyModule.load_from_checkpoint(root / "file.ckpt", in_init=True)
    for (name, param), other in zip(module.model.named_parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(whole(param), other), name


@pytest.mark.parametrize("name", row)
def test_works_or_is_refused(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
