"""The Trainer's flags at ep=2: each works, or is refused with words that say what to do."""

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
from lightning.pytorch.profilers import PyTorchProfiler
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.data import DataLoader

from lightning_ep import ExpertParallelStrategy
from tests.rows import STEPS, WORLD, RowFailures, Rows, agreed, check, fit, refused
from tests.tiny import TinyModule, loader, quiet

row = Rows()


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

    class Broken(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * float("nan")

    with refused("returned nan values"):
        fit(root, Broken(), detect_anomaly=True)
    # Experts' gradients are shards, which anomaly detection sees as such.
    mesh = init_device_mesh("cpu", (WORLD,))
    mine = torch.tensor([[0.0, float("nan") if dist.get_rank() == 0 else 1.0]])
    for placement in (Shard(0), Replicate()):
        found = DTensor.from_local(mine, mesh, [placement], run_check=False).isnan()._is_any_true().item()
        assert found or dist.get_rank() != 0


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


@pytest.mark.parametrize("name", row)
def test_works_or_is_refused(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
