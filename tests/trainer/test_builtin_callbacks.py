"""Every built-in callback at ep=2: it works, or it is refused with words that say what to do."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import callbacks as builtin
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.reference import relative_error, tiny_model
from tests.rows import STEPS, WORLD, RowFailures, Rows, agreed, check, fit, refused, whole
from tests.tiny import SMALL, Samples, TinyModule, loader, quiet

row = Rows()


@row("Callback")
def user_callback(root: Path) -> None:
    calls = []

    class Mine(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            calls.append((trainer.global_step, outputs["loss"].item()))

        def on_validation_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            calls.append(trainer.callback_metrics["val_loss"].item())

    _, module = fit(root, callbacks=[Mine()], num_sanity_val_steps=0)
    assert calls[:2] == [(1, module.losses[0]), (2, module.losses[1])]
    assert agreed(calls[2])


@row("LambdaCallback")
def lambda_callback(root: Path) -> None:
    steps: list[int] = []
    fit(root, callbacks=[builtin.LambdaCallback(on_train_batch_end=lambda *_: steps.append(1))])
    assert len(steps) == STEPS


@row("ModelCheckpoint")
def model_checkpoint_top_k_and_last(root: Path) -> None:
    class Numbered(TinyModule):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)
            self.log("score", float(self.global_step))

    keep = builtin.ModelCheckpoint(
        root, monitor="score", mode="max", save_top_k=2, save_last=True, filename="{step}", every_n_train_steps=None
    )
    trainer = quiet(root, callbacks=[keep], max_epochs=1, val_check_interval=0.25)
    trainer.fit(Numbered(), loader(), loader(4))
    found = sorted(path.name for path in root.iterdir())
    assert found == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"], found
    assert (root / "step=4.ckpt").is_dir()
    assert keep.best_model_path == str(root / "step=4.ckpt")
    assert not {"_link_checkpoint", "file_exists"} & set(vars(keep)), "the callback is not as it was before the run"


@row("ModelCheckpoint")
def model_checkpoint_every_n_train_steps(root: Path) -> None:
    keep = builtin.ModelCheckpoint(
        root, every_n_train_steps=1, save_top_k=-1, filename="{step}", save_weights_only=True
    )
    fit(root, callbacks=[keep])
    assert sorted(path.name for path in root.iterdir()) == ["step=1.ckpt", "step=2.ckpt"]


@row("Checkpoint")
def own_checkpoint(root: Path) -> None:
    class Mine(builtin.Checkpoint):
        def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
            trainer.save_checkpoint(root / "mine.ckpt")

    trainer, _ = fit(root, callbacks=[Mine()])
    assert (root / "mine.ckpt").is_dir()
    with refused("is a directory with other things in it", "mine.ckpt", "instead|another"):
        trainer.save_checkpoint(root)
    assert (root / "mine.ckpt").is_dir()


@row("EarlyStopping")
def early_stopping(root: Path) -> None:
    stop = builtin.EarlyStopping("val_loss", patience=1, min_delta=1e9, verbose=False)
    trainer = quiet(root, callbacks=[stop], max_epochs=9, limit_train_batches=1)
    trainer.fit(TinyModule(), loader(), loader(4))
    assert trainer.global_step == 2
    assert agreed(trainer.current_epoch)


@row("LearningRateMonitor")
def learning_rate_monitor(root: Path) -> None:
    logger = CSVLogger(root, name="", version="log")
    fit(root, callbacks=[builtin.LearningRateMonitor("step")], logger=logger, log_every_n_steps=1)
    assert "lr-SGD" in (root / "log" / "metrics.csv").read_text()


@row("DeviceStatsMonitor")
def device_stats_monitor(root: Path) -> None:
    logger = CSVLogger(root, name="", version="log")
    # On a CPU its numbers come from psutil, which is no dependency: here only that it runs.
    fit(root, callbacks=[builtin.DeviceStatsMonitor(cpu_stats=False)], logger=logger, log_every_n_steps=1)


@row("GradientAccumulationScheduler")
def gradient_accumulation_scheduler(root: Path) -> None:
    schedule = builtin.GradientAccumulationScheduler({0: 1, 1: 2})
    trainer = quiet(root, callbacks=[schedule], max_epochs=2, limit_train_batches=2)
    module = TinyModule()
    trainer.fit(module, loader())
    check(trainer, module, steps=2 + 1)


@row("Timer")
def timer(root: Path) -> None:
    clock = builtin.Timer(duration=timedelta(seconds=0.2), interval="step")
    trainer = quiet(root, callbacks=[clock], max_epochs=-1)
    trainer.fit(TinyModule(), loader())
    assert clock.time_elapsed("train") > 0.2
    assert agreed(trainer.global_step)


@row("ModelSummary")
def model_summary(root: Path) -> None:
    trainer, module = fit(root, callbacks=[builtin.ModelSummary(max_depth=3)], enable_model_summary=True)
    summary = builtin.ModelSummary(max_depth=3)._summary(trainer, module)
    expected = sum(param.numel() for param in tiny_model(**SMALL).parameters())
    assert summary.total_parameters == expected, f"{summary.total_parameters} parameters in the summary, not {expected}"


@row("RichModelSummary")
def rich_model_summary(root: Path) -> None:
    fit(root, callbacks=[builtin.RichModelSummary()], enable_model_summary=True)


@row("TQDMProgressBar")
def tqdm_progress_bar(root: Path) -> None:
    fit(root, callbacks=[builtin.TQDMProgressBar()], enable_progress_bar=True)


@row("RichProgressBar")
def rich_progress_bar(root: Path) -> None:
    fit(root, callbacks=[builtin.RichProgressBar()], enable_progress_bar=True)


@row("ProgressBar")
def own_progress_bar(root: Path) -> None:
    class Mine(builtin.ProgressBar):
        shown: Any = None

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
            self.shown = self.get_metrics(trainer, module)

        def disable(self) -> None:
            pass

    class Shown(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("shown", loss, prog_bar=True)
            return loss

    bar = Mine()
    fit(root, Shown(), callbacks=[bar], enable_progress_bar=True)
    assert "shown" in bar.shown


@row("BasePredictionWriter")
def prediction_writer(root: Path) -> None:
    class Writer(builtin.BasePredictionWriter):
        def write_on_batch_end(
            self, trainer: L.Trainer, module: Any, prediction: Any, indices: Any, batch: Any, *_: int
        ) -> None:
            assert indices == prediction.tolist()
            batches.append(indices)

        def write_on_epoch_end(self, trainer: L.Trainer, module: Any, predictions: Any, batch_indices: Any) -> None:
            epoch.append([index for batch in batch_indices[0] for index in batch])

    batches: list[list[int]] = []
    epoch: list[list[int]] = []
    trainer = quiet(root, callbacks=[Writer("batch_and_epoch")])
    trainer.predict(TinyModule(), loader(5, first=0))
    everyone: list[Any] = [None] * WORLD
    dist.all_gather_object(everyone, (batches, epoch))
    assert sorted(i for batches, _ in everyone for batch in batches for i in batch) == [0, 1, 2, 3, 4], everyone
    assert sorted(i for _, epoch in everyone for i in epoch[0]) == [0, 1, 2, 3, 4], everyone


@row("StochasticWeightAveraging")
def stochastic_weight_averaging(root: Path) -> None:
    with refused("StochasticWeightAveraging", "instead"):
        quiet(root, callbacks=[builtin.StochasticWeightAveraging(1e-2)], max_epochs=2, limit_train_batches=1).fit(
            TinyModule(), loader()
        )


@row()
def average_of_the_shards(root: Path) -> None:
    """What the refusals of the averaging callbacks say to do instead."""

    class Average(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
            self.average = [param.detach().clone() for param in module.parameters()]

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            for average, param in zip(self.average, module.parameters(), strict=True):
                average.lerp_(param.detach(), 0.5)
            history.append(whole(module.model.lm_head.weight))

    history: list[Tensor] = []
    mine = Average()
    _, module = fit(root, callbacks=[mine])
    start = tiny_model(**SMALL).lm_head.weight.detach()
    names = [name for name, _ in module.named_parameters()]
    found = whole(mine.average[names.index("model.lm_head.weight")])
    torch.testing.assert_close(found, start / 4 + history[0] / 4 + history[1] / 2)


@row("WeightAveraging")
def weight_averaging(root: Path) -> None:
    with refused("WeightAveraging", "instead"):
        fit(root, callbacks=[builtin.WeightAveraging()])


@row("EMAWeightAveraging")
def ema_weight_averaging(root: Path) -> None:
    with refused("EMAWeightAveraging", "instead"):
        fit(root, TinyModule(in_init=True), callbacks=[builtin.EMAWeightAveraging()])


@row("ModelPruning")
def model_pruning(root: Path) -> None:
    with refused("ModelPruning", "instead"):
        fit(root, TinyModule(in_init=True), callbacks=[builtin.ModelPruning("l1_unstructured", amount=0.5)])


@row("SpikeDetection")
def spike_detection(root: Path) -> None:
    class Detect(builtin.SpikeDetection):
        pass

    fit(root, callbacks=[Detect(warmup=1, exclude_batches_path=root / "skip.json")])


class Finetuned(TinyModule):
    """The transformers model is the backbone, a linear layer on top of it the head."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(in_init=True, **kwargs)
        self.head = nn.Linear(self.model.config.hidden_size, 1)
        with torch.no_grad():
            self.head.weight.fill_(0.1)

    @property
    def backbone(self) -> Any:
        return self.model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.model(input_ids=batch["input_ids"], labels=batch["labels"], output_hidden_states=True)
        return output.loss + self.head(output.hidden_states[-1]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@row("BackboneFinetuning")
def backbone_finetuning(root: Path) -> None:
    """Against a plain loop that gives the optimizer the backbone at epoch 1 and raises its rate at epoch 2."""

    class Head(Finetuned):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([param for param in self.parameters() if param.requires_grad], lr=0.1)

    class Step(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            (optimizer,) = trainer.optimizers
            seen.append([(len(group["params"]), group["lr"]) for group in optimizer.param_groups])

    seen: list[list[tuple[int, float]]] = []
    module, plain = Head(), Head()
    plain.load_state_dict(module.state_dict())
    theirs = vars(builtin.BaseFinetuning)["filter_on_optimizer"]
    thaw = builtin.BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.02, lambda_func=lambda _: 2.0)
    quiet(root, callbacks=[thaw, Step()], max_epochs=3, limit_train_batches=1).fit(module, loader(4))
    size = len(list(plain.model.parameters()))
    assert seen == [[(2, 0.1)], [(2, 0.1), (size, 0.02)], [(2, 0.1), (size, 0.04)]], seen
    assert vars(builtin.BaseFinetuning)["filter_on_optimizer"] is theirs
    samples = [Samples(4)[index] for index in range(4)]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    rates = dict.fromkeys(plain.model.parameters(), (0.0, 0.02, 0.04))
    for epoch in range(3):
        plain.training_step(batch, 0).backward()
        with torch.no_grad():
            for param in plain.parameters():
                param -= rates.get(param, (0.1,) * 3)[epoch] * param.grad  # type: ignore[operator]
                param.grad = None
    for (name, param), expected in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert (error := relative_error(whole(param), expected.detach())) < 1e-5, (name, error)


@row("BaseFinetuning")
def base_finetuning(root: Path) -> None:
    class Thaw(builtin.BaseFinetuning):
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.backbone)

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.make_trainable(module.backbone)

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            now = {name: whole(param) for name, param in module.model.named_parameters()}
            moved.append([name for name in now if not torch.equal(now[name], start[name])])

    module = Finetuned()
    start = {name: param.detach().clone() for name, param in module.model.named_parameters()}
    moved: list[list[str]] = []
    trainer = quiet(root, callbacks=[Thaw(), Watch()], max_epochs=2, limit_train_batches=1)
    trainer.fit(module, loader(), loader(4))
    assert moved[0] == []
    assert set(moved[1]) == set(start), f"never thawed: {set(start) - set(moved[1])}"


@row()
def thawed_parameters_join_the_optimizer(root: Path) -> None:
    """By hand, without the callback's own method."""

    class Head(Finetuned):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([param for param in self.parameters() if param.requires_grad], lr=self.lr)

    class Thaw(builtin.BaseFinetuning):
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.backbone)

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                module.backbone.requires_grad_(True)
                optimizer.add_param_group({"params": list(module.backbone.parameters())})

    module = Head()
    start = {name: param.detach().clone() for name, param in module.model.named_parameters()}
    quiet(root, callbacks=[Thaw()], max_epochs=2, limit_train_batches=1).fit(module, loader(), loader(4))
    still = [name for name, param in module.model.named_parameters() if torch.equal(whole(param), start[name])]
    assert not still


@row()
def freezing_later(root: Path) -> None:
    class Freeze(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            embedding = module.model.model.embed_tokens.weight
            embedding.requires_grad_(False)
            embedding.grad = None
            frozen.append(whole(embedding))

    frozen: list[Tensor] = []
    module = Finetuned()
    start = module.model.model.embed_tokens.weight.detach().clone()
    fit(root, module, callbacks=[Freeze()])
    assert not torch.equal(frozen[0], start)
    assert torch.equal(frozen[0], frozen[1])


class Batched(TinyModule):
    """Has its own loader, so that the tuner can change its batch size."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batch_size = 1

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Samples(64), batch_size=self.batch_size)


@row("BatchSizeFinder")
def batch_size_finder(root: Path) -> None:
    with refused("BatchSizeFinder", "fast_dev_run", "instead"):
        quiet(root, callbacks=[builtin.BatchSizeFinder()], max_steps=STEPS).fit(Batched())


@row("LearningRateFinder")
def learning_rate_finder(root: Path) -> None:
    with refused("LearningRateFinder", "max_steps", "instead"):
        quiet(root, callbacks=[builtin.LearningRateFinder(num_training_steps=4)], max_steps=STEPS).fit(Batched())


@row("OnExceptionCheckpoint")
def on_exception_checkpoint(root: Path) -> None:
    with refused("OnExceptionCheckpoint", "instead"):
        fit(root, callbacks=[builtin.OnExceptionCheckpoint(root)])
    with refused("save_on_exception=True", "every_n_train_steps", "instead"):
        fit(root, callbacks=[builtin.ModelCheckpoint(root, save_on_exception=True)])


@row("ThroughputMonitor")
def throughput_monitor(root: Path) -> None:
    logger = CSVLogger(root, name="", version="log")
    monitor = builtin.ThroughputMonitor(batch_size_fn=lambda batch: len(batch["id"]), window_size=2)
    fit(root, callbacks=[monitor], logger=logger, log_every_n_steps=1)
    text = (root / "log" / "metrics.csv").read_text()
    assert "train/device/batches_per_sec" in text, text


def test_every_built_in_callback_has_a_row() -> None:
    assert set(builtin.__all__) == row.covered


@pytest.mark.parametrize("name", row)
def test_works_or_is_refused(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
