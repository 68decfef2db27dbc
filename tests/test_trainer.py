"""Every built-in callback and Trainer flag at ep=2: it works, or it is refused with words that say what to do."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import callbacks as builtin
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import PyTorchProfiler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_ep import ExpertParallelStrategy
from tests.distributed import run_ranks
from tests.reference import relative_error, tiny_model
from tests.tiny import SMALL, Samples, TinyModule, loader, quiet

WORLD, STEPS = 2, 2
Row = Callable[[Path], None]
ROWS: dict[str, Row] = {}
COVERED: set[str] = set()


def row(*callbacks: str) -> Callable[[Row], Row]:
    """Registers a row, and the built-in callbacks that it covers."""

    def register(function: Row) -> Row:
        ROWS[function.__name__] = function
        COVERED.update(callbacks)
        return function

    return register


# ---------------------------------------------------------------------------------------------------- the two ranks


def _worker(names: list[str], root: Path) -> dict[str, str]:
    """Runs the rows and returns the traceback of each that failed on this rank."""
    failed: dict[str, str] = {}
    for index, name in enumerate(names):
        _state_of_process()
        start = time.perf_counter()
        try:
            ROWS[name](root / name)
        except BaseException:  # a failed checkpoint is no Exception
            failed[name] = traceback.format_exc()
        print(f"row {name}: {time.perf_counter() - start:.2f} s", flush=True)
        if hung := _others_hang(index):
            raise AssertionError(f"rank(s) {hung} hang in row {name}, which here {failed.get(name, 'passed')}")
    return failed


def _state_of_process() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def _others_hang(index: int) -> list[int]:
    """Ranks that do not arrive here; through the store, since a rank that failed alone left a collective unmatched."""
    if not dist.is_initialized():
        return []
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    store.set(f"row-{index}-{rank}", "")
    missing = []
    for other in range(dist.get_world_size()):
        try:
            store.wait([f"row-{index}-{other}"], timedelta(seconds=10))
        except dist.DistStoreError:
            missing.append(other)
    return missing


@pytest.fixture(scope="module")
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    wanted = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    }
    names = [name for name in ROWS if name in wanted]
    return run_ranks(WORLD, _worker, names, tmp_path_factory.mktemp("rows"), init_process_group=False, timeout=100)


def agreed(value: Any) -> bool:
    """Whether all ranks have the same value."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(other == value for other in values)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """The body raises an error that holds all of ``words``: what was found, the rule, what to do instead."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        missing = [word for word in words if not re.search(word, str(error))]
        if missing:
            raise AssertionError(f"the message does not say {missing}: {error}") from error
    else:
        raise AssertionError("was not refused")


def fit(root: Path, module: L.LightningModule | None = None, **overrides: Any) -> tuple[L.Trainer, Any]:
    """Two optimizer steps, validated after the epoch; checks that they happened and that the ranks agree."""
    module = TinyModule() if module is None else module
    if not {"max_epochs", "max_steps", "fast_dev_run"} & overrides.keys():
        overrides["max_epochs"] = 1
    size = STEPS * WORLD * 2 * overrides.get("accumulate_grad_batches", 1)
    trainer = quiet(root, **overrides)
    trainer.fit(module, loader(size), loader(4, first=100))
    assert trainer.state.finished
    check(trainer, module)
    return trainer, module


def check(trainer: L.Trainer, module: L.LightningModule, steps: int = STEPS) -> None:
    assert trainer.global_step == steps, f"{trainer.global_step} optimizer steps"
    start = tiny_model(**module.overrides).state_dict()
    for name, param in module.model.named_parameters():
        full = whole(param)
        assert full.isfinite().all(), name
        assert agreed(full.sum().item()), name
        if name.endswith(("gate_up_proj", "q_proj.weight", "lm_head.weight")) and steps:
            assert not torch.equal(full, start[name]), f"{name} has not moved"


def whole(param: Tensor) -> Tensor:
    return (param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()).clone()


# ---------------------------------------------------------------------------------------------------- callbacks


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


@row("EarlyStopping")
def early_stopping_on_a_metric_of_one_rank(root: Path) -> None:
    class Unequal(TinyModule):
        def on_validation_epoch_end(self) -> None:
            self.log("mine", float(self.global_step if self.global_rank == 0 else -self.global_step))

    stop = builtin.EarlyStopping("mine", patience=1, mode="max")
    trainer = quiet(root, callbacks=[stop], max_epochs=4, limit_train_batches=1)
    trainer.fit(Unequal(), loader(), loader(4))
    assert agreed(trainer.global_step)


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
    found = mine.average[names.index("model.lm_head.weight")].full_tensor()
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
    with refused("BackboneFinetuning", "BaseFinetuning", "instead"):
        fit(root, Finetuned(), callbacks=[builtin.BackboneFinetuning()])


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


# ---------------------------------------------------------------------------------------------------- Trainer flags


@row()
def fast_dev_run(root: Path) -> None:
    _trainer, module = fit(root, fast_dev_run=STEPS)
    assert agreed(len(module.losses))
    assert not root.exists() or not list(root.iterdir())


@row()
def overfit_batches_int(root: Path) -> None:
    trainer = quiet(root, overfit_batches=1, max_epochs=2)
    module = TinyModule()
    trainer.fit(module, loader(), loader(4))
    check(trainer, module)
    assert module.seen[:2] == module.seen[2:]


@row()
def overfit_batches_float(root: Path) -> None:
    trainer = quiet(root, overfit_batches=0.5, max_epochs=1)
    module = TinyModule()
    trainer.fit(module, loader(16), loader(16))
    check(trainer, module)


@row()
def limit_batches_int(root: Path) -> None:
    counts = _limited(root, 1)
    assert counts == {"train": 1, "val": 1, "test": 1, "predict": 1}, counts


@row()
def limit_batches_float(root: Path) -> None:
    counts = _limited(root, 0.5)
    assert counts == {"train": 2, "val": 2, "test": 2, "predict": 2}, counts


def _limited(root: Path, limit: int | float) -> dict[str, int]:
    counts = dict.fromkeys(["train", "val", "test", "predict"], 0)

    class Count(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            counts["train"] += 1

        def on_validation_batch_end(self, *_: Any) -> None:
            counts["val"] += 1

        def on_test_batch_end(self, *_: Any) -> None:
            counts["test"] += 1

        def on_predict_batch_end(self, *_: Any) -> None:
            counts["predict"] += 1

    limits = {f"limit_{stage}_batches": limit for stage in counts}
    trainer = quiet(root, max_epochs=1, num_sanity_val_steps=0, callbacks=[Count()], **limits)
    module = TinyModule()
    trainer.fit(module, loader(), loader())  # 16 samples, 2 ranks, batches of 2: 4 batches
    trainer.test(module, loader(), verbose=False)
    trainer.predict(module, loader())
    return counts


@row()
def accumulate_grad_batches(root: Path) -> None:
    _, module = fit(root, accumulate_grad_batches=2)
    assert len(module.losses) == 2 * STEPS


@row()
def accumulate_over_the_end_of_an_epoch(root: Path) -> None:
    trainer = quiet(root, accumulate_grad_batches=3, max_epochs=1)
    module = TinyModule()
    trainer.fit(module, loader())  # 4 batches: a window of 3 and one of 1
    check(trainer, module)


@row()
def gradient_clip_norm(root: Path) -> None:
    assert _clipped_norm(root, gradient_clip_val=1e-3, gradient_clip_algorithm="norm") == pytest.approx(1e-3, rel=1e-3)


@row()
def gradient_clip_value(root: Path) -> None:
    largest = _clipped_norm(root, float("inf"), gradient_clip_val=1e-4, gradient_clip_algorithm="value")
    assert largest == pytest.approx(1e-4)


def _clipped_norm(root: Path, norm_type: float = 2.0, **overrides: Any) -> float:
    norms: list[float] = []

    class Clipped(TinyModule):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            grads = [param.grad.full_tensor().flatten() for param in self.parameters()]
            norms.append(torch.cat(grads).norm(norm_type).item())

    fit(root, Clipped(), **overrides)
    assert agreed(norms)
    return norms[0]


@row()
def gradient_norm_without_clipping(root: Path) -> None:
    class Tracked(TinyModule):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            norm = self.trainer.strategy.clip_grad_norm_(max_norm=float("inf"))
            grads = torch.cat([param.grad.full_tensor().flatten() for param in self.parameters()])
            assert norm.item() == pytest.approx(grads.norm().item(), rel=1e-5)
            self.log("grad_norm", norm)

    trainer, _ = fit(root, Tracked())
    assert agreed(trainer.callback_metrics["grad_norm"].item())


@row()
def val_check_interval(root: Path) -> None:
    for interval, expected in ((1, 4), (0.5, 2)):
        validations: list[int] = []
        count = builtin.LambdaCallback(on_validation_end=lambda *_, seen=validations: seen.append(1))
        trainer = quiet(root, val_check_interval=interval, callbacks=[count], max_epochs=1, num_sanity_val_steps=0)
        trainer.fit(TinyModule(), loader(), loader(4))
        assert len(validations) == expected, (interval, validations)


@row()
def check_val_every_n_epoch(root: Path) -> None:
    epochs: list[int] = []
    count = builtin.LambdaCallback(on_validation_end=lambda trainer, _: epochs.append(trainer.current_epoch))
    flags = {"check_val_every_n_epoch": 2, "max_epochs": 4, "limit_train_batches": 1, "num_sanity_val_steps": 0}
    quiet(root, callbacks=[count], **flags).fit(TinyModule(), loader(), loader(4))
    assert epochs == [1, 3]


@row()
def sanity_validation(root: Path) -> None:
    # Runs under inference mode before the first training step, which must not leave inference tensors behind.
    for steps in (-1, 1):
        fit(root, num_sanity_val_steps=steps)


@row()
def inference_mode_off(root: Path) -> None:
    fit(root, inference_mode=False)


@row()
def detect_anomaly(root: Path) -> None:
    fit(root, detect_anomaly=True)


@row()
def deterministic(root: Path) -> None:
    first, second = (fit(root, deterministic=True)[1].losses for _ in range(2))
    assert first == second


@row()
def benchmark(root: Path) -> None:
    fit(root, benchmark=True)


@row()
def profiler_simple(root: Path) -> None:
    trainer, _ = fit(root, profiler="simple")
    assert "run_training_batch" in trainer.profiler.summary()


@row()
def profiler_advanced(root: Path) -> None:
    fit(root, profiler="advanced")


@row()
def profiler_pytorch(root: Path) -> None:
    fit(root, profiler=PyTorchProfiler(dirpath=root, filename="profile", export_to_chrome=False))


@row()
def max_time(root: Path) -> None:
    trainer = quiet(root, max_time=timedelta(seconds=0.3), max_epochs=-1)
    trainer.fit(TinyModule(), loader())
    assert trainer.global_step > 0
    assert agreed(trainer.global_step)


@row()
def max_epochs(root: Path) -> None:
    trainer = quiet(root, max_epochs=2)
    module = TinyModule()
    trainer.fit(module, loader(8))
    check(trainer, module, steps=4)
    assert trainer.current_epoch == 2


@row()
def min_steps(root: Path) -> None:
    class Impatient(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.trainer.should_stop = True
            return super().training_step(batch, batch_idx)

    trainer = quiet(root, min_steps=3, max_epochs=5)
    trainer.fit(Impatient(), loader())
    assert trainer.global_step >= 3
    assert agreed(trainer.global_step)


@row()
def barebones(root: Path) -> None:
    strategy = ExpertParallelStrategy(ep=2)
    trainer = L.Trainer(barebones=True, strategy=strategy, accelerator="cpu", devices=WORLD, max_steps=STEPS)
    module = TinyModule()
    trainer.fit(module, loader())
    check(trainer, module)


@row()
def reload_dataloaders(root: Path) -> None:
    class Reloading(TinyModule):
        loaded = 0

        def train_dataloader(self) -> DataLoader:
            self.loaded += 1
            return loader()

    module = Reloading()
    trainer = quiet(root, reload_dataloaders_every_n_epochs=1, max_epochs=2, limit_train_batches=1)
    trainer.fit(module)
    assert module.loaded == 2


@row()
def log_every_n_steps(root: Path) -> None:
    logger = CSVLogger(root, name="", version="log")
    fit(root, logger=logger, log_every_n_steps=2)
    assert (root / "log" / "metrics.csv").read_text().count("\n") >= 2


@row()
def sync_batchnorm(root: Path) -> None:
    with refused("sync_batchnorm", "instead"):
        fit(root, sync_batchnorm=True)


@row()
def own_sampler(root: Path) -> None:
    _, module = fit(root, use_distributed_sampler=False, max_steps=STEPS)
    assert module.seen == [0, 1, 2, 3]


@row()
def default_sampler(root: Path) -> None:
    trainer = quiet(root, max_epochs=1)
    module = TinyModule()
    trainer.fit(module, loader())
    everyone: list[Any] = [None] * WORLD
    dist.all_gather_object(everyone, module.seen)
    assert sorted(everyone[0] + everyone[1]) == list(range(16))


@row()
def strategy_by_name(root: Path) -> None:
    for name in ("ep", "expert_parallel"):
        trainer, _ = fit(root, strategy=name)
        assert isinstance(trainer.strategy, ExpertParallelStrategy)
        assert trainer.strategy.layout.ep == WORLD


@row()
def every_precision(root: Path) -> None:
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        fit(root, precision=precision)


# ---------------------------------------------------------------------------------------------------- sequences of runs


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
def evaluate_before_and_after_fit(root: Path) -> None:
    module = TinyModule()
    trainer = quiet(root, max_steps=STEPS)
    before = trainer.validate(module, loader(4), verbose=False)[0]["val_loss"]
    trainer.test(module, loader(4), verbose=False)
    assert len(trainer.predict(module, loader(4))) == 1
    expected = tiny_model(**SMALL)
    losses = [
        expected(input_ids=batch["input_ids"], labels=batch["labels"]).loss.item()
        for batch in (Samples(4)[i] for i in range(4))
        if batch["input_ids"].unsqueeze_(0) is not None and batch["labels"] is not None
    ]
    assert before == pytest.approx(sum(losses) / 4, rel=1e-5)
    trainer.fit(module, loader(), loader(4))
    check(trainer, module)
    after = trainer.validate(module, loader(4), verbose=False)[0]["val_loss"]
    assert after != before
    assert agreed(after)
    assert trainer.test(module, loader(4), verbose=False)[0]["test_loss"] == after
    assert len(trainer.predict(module, loader(4))) == 1
    quiet(root).validate(module, loader(4), verbose=False)


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


# ---------------------------------------------------------------------------------------------------- optimizers, heads


class WithValueHead(TinyModule):
    """An `nn.Linear` beside the transformers model, trained with it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = value_head()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return with_value_loss(self.model, self.head, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def value_head() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Linear(32, 1)


def with_value_loss(model: nn.Module, head: nn.Module, batch: Any) -> Tensor:
    output = model(input_ids=batch["input_ids"], labels=batch["labels"], output_hidden_states=True)
    return output.loss + (head(output.hidden_states[-1]) - 1).square().mean()


@row()
def value_head_outside_the_model(root: Path) -> None:
    module = WithValueHead()
    flags = {"use_distributed_sampler": False, "max_epochs": 1}
    quiet(root, **flags).fit(module, DataLoader(_Mine(2), batch_size=None))
    model, head = tiny_model(**SMALL), value_head()
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(WORLD):
            (with_value_loss(model, head, _batch(step, rank)) / WORLD).backward()
        optimizer.step()
    _equal(module.head, head)
    _equal(module.model, model)


def _batch(step: int, rank: int) -> dict[str, Tensor]:
    samples = [Samples(100)[10 * step + 2 * rank + i] for i in range(2)]
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


class _Mine(torch.utils.data.Dataset):
    """The batches of this rank, one per step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return _batch(step, dist.get_rank())


def _equal(sharded: nn.Module, reference: nn.Module, tolerance: float = 1e-5) -> None:
    found, expected = dict(sharded.named_parameters()), dict(reference.named_parameters())
    assert found.keys() == expected.keys()
    errors = {name: relative_error(whole(found[name]), expected[name].detach()) for name in found}
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, wrong


@row()
def trainable_parameter_on_the_module_is_refused(root: Path) -> None:
    class Bare(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

    with refused("temperature", "diverge", "submodule"):
        fit(root, Bare())


@row()
def fused_and_foreach_optimizers(root: Path) -> None:
    wrong = {}
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        for flag in ("foreach",) if kind is torch.optim.SGD else ("fused", "foreach"):

            class Chosen(WithValueHead):
                kind: Any
                flag: str

                def configure_optimizers(self) -> Any:
                    kwargs = {"momentum": 0.9} if self.kind is torch.optim.SGD else {}
                    return self.kind(self.parameters(), lr=1e-2, **{self.flag: True}, **kwargs)

            Chosen.kind, Chosen.flag = kind, flag
            module = Chosen()
            try:
                quiet(root, use_distributed_sampler=False, max_epochs=1).fit(
                    module, DataLoader(_Mine(2), batch_size=None)
                )
            except Exception as error:
                wrong[kind.__name__, flag] = f"{type(error).__name__}: {error}"
                continue
            model, head = tiny_model(**SMALL), value_head()
            params = [*model.parameters(), *head.parameters()]
            optimizer = kind(params, lr=1e-2, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
            for step in range(2):
                optimizer.zero_grad()
                for rank in range(WORLD):
                    (with_value_loss(model, head, _batch(step, rank)) / WORLD).backward()
                optimizer.step()
            # Adam's first steps are signs, which amplifies rounding where a gradient is nearly zero.
            _equal(module.head, head, 1e-3)
            _equal(module.model, model, 1e-3)
    assert not wrong, wrong


@row()
def optimizers_that_cannot_run_on_shards(root: Path) -> None:
    class Fused(TinyModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)

    class Flat(TinyModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1)

    with refused("SGD", "fused=True", "foreach=True", "instead"):
        fit(root, Fused())
    with refused("LBFGS", "AdamW", "instead"):
        fit(root, Flat())


class Manual(WithValueHead):
    """Two optimizers, stepped by hand, one clipped, each with its own loss."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for index, optimizer in enumerate(self.optimizers()):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            loss = with_value_loss(self.model, self.head, batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            if index == 0:
                params = [param for group in optimizer.param_groups for param in group["params"]]
                self.norms.append(self.trainer.strategy.clip_grad_norm_(params, 0.5).item())
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.1), torch.optim.SGD(self.head.parameters(), lr=0.1)


def _manual_reference() -> tuple[nn.Module, nn.Module, list[float]]:
    model, head, norms = tiny_model(**SMALL), value_head(), []
    first, second = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(head.parameters(), lr=0.1)
    for step in range(2):
        for optimizer in (first, second):
            model.zero_grad()
            head.zero_grad()
            for rank in range(WORLD):
                (with_value_loss(model, head, _batch(step, rank)) / WORLD).backward()
            if optimizer is first:
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
            optimizer.step()
    return model, head, norms


@row()
def manual_optimization(root: Path) -> None:
    _manual(root, toggle=False, zero_all=True)


@row()
def manual_optimization_toggled(root: Path) -> None:
    _manual(root, toggle=True, zero_all=False)


def _manual(root: Path, toggle: bool, zero_all: bool) -> None:
    module = Manual(toggle)
    if zero_all:
        module.on_before_zero_grad = lambda _: module.zero_grad()  # type: ignore[method-assign]
    trainer = quiet(root, use_distributed_sampler=False, max_epochs=1)
    trainer.fit(module, DataLoader(_Mine(2), batch_size=None))
    model, head, norms = _manual_reference()
    assert module.norms == pytest.approx(norms, rel=1e-5), (module.norms, norms)
    _equal(module.head, head)
    _equal(module.model, model)


@row()
def toggled_parameters_get_no_gradient(root: Path) -> None:
    found: list[list[str]] = []

    class Watched(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.toggle_optimizer(second)
            second.zero_grad()
            first.zero_grad()
            self.manual_backward(with_value_loss(self.model, self.head, batch))
            found.append([name for name, param in self.named_parameters() if param.grad is not None])
            self.untoggle_optimizer(second)

    quiet(root, use_distributed_sampler=False, max_epochs=1).fit(Watched(True), DataLoader(_Mine(2), batch_size=None))
    assert found[0] == found[1] == ["head.weight", "head.bias"], found


@row()
def lr_scheduler(root: Path) -> None:
    class Scheduled(TinyModule):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    trainer, _ = fit(root, Scheduled())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**STEPS


@row()
def torch_compile_of_the_module(root: Path) -> None:
    with refused("compile"):
        quiet(root, max_steps=1).fit(torch.compile(TinyModule()), loader())


# ---------------------------------------------------------------------------------------------------- the tests

BROKEN: dict[str, str] = {
    "on_exception_checkpoint": "its own on_exception tries to save before the refusal is shown",
    "detect_anomaly": "DTensor has no rule for aten._is_any_true",
}


def _rows() -> list[Any]:
    return [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=BROKEN[name])) if name in BROKEN else name
        for name in ROWS
    ]


def test_every_built_in_callback_has_a_row() -> None:
    assert set(builtin.__all__) == COVERED


@pytest.mark.parametrize("name", _rows())
def test_works_or_is_refused(name: str, failures: list[dict[str, str]]) -> None:
    errors = [f"rank {rank}: {failed[name]}" for rank, failed in enumerate(failures) if name in failed]
    assert not errors, "\n".join(errors)
