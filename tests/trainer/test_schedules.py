"""Learning rates end with the run, whatever ends it and wherever it is resumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_ep import Schedule
from lightning_ep.cli.training import run
from lightning_ep.data import ResumableLoader
from tests.tiny import Samples, TinyModule, quiet


def rates(steps: int, lr: float = 2.0, **settings: Any) -> list[float]:
    """The learning rate of every step of a plain loop."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = Schedule(optimizer, total_steps=steps, **settings)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr() == found[-1:]
        optimizer.step()
        schedule.step()
    return found


def test_shapes_are_those_of_their_names() -> None:
    assert rates(4, shape="linear") == pytest.approx([2, 1.5, 1, 0.5])
    assert rates(4, shape="linear", end=0.5) == pytest.approx([2, 1.75, 1.5, 1.25])
    assert rates(4, shape="cosine") == pytest.approx([1 + math.cos(math.pi * step / 4) for step in range(4)])
    assert rates(4, shape="constant") == [2, 2, 2, 2]
    assert rates(8, shape="wsd", decay=4) == pytest.approx([2, 2, 2, 2, 2, 1.5, 1, 0.5])
    assert rates(8, shape="wsd", decay=0.5) == rates(8, shape="wsd", decay=4)
    assert rates(8, shape="wsd", decay=0) == [2] * 8


def test_warm_up_is_a_share_or_a_number_of_steps() -> None:
    assert rates(6, shape="constant", warmup=4) == pytest.approx([0.5, 1, 1.5, 2, 2, 2])
    assert rates(8, shape="linear", warmup=0.5) == pytest.approx([0.5, 1, 1.5, 2, 1.6, 1.2, 0.8, 0.4])
    assert rates(8, shape="wsd", warmup=2, decay=2) == pytest.approx([1, 2, 2, 2, 2, 2, 2, 1])
    assert rates(3, shape="cosine", warmup=6) == pytest.approx([1 / 3, 2 / 3, 1])  # a short trial of a long recipe
    for shape in ("cosine", "linear", "wsd"):
        found = rates(50, shape=shape, warmup=0.1, decay=0.2, end=0.1)
        assert max(found) == found[4] == 2
        assert found[:4] == sorted(found[:4])
        assert found[4:] == sorted(found[4:], reverse=True)
        assert 0.2 < found[-1] < 0.4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "cosin"}, "shape='cosin' is none of cosine, linear, wsd, constant"),
        ({"warmup": -1}, "warmup=-1 must be a share of the steps below 1, or a whole number"),
        ({"warmup": 2.5}, r"warmup=2\.5 must be"),
        ({"decay": 1.5}, r"decay=1\.5 must be"),
        ({"end": 2}, "end=2 must lie between 0 and 1"),
        ({"total_steps": math.inf}, "ends with the run. Say when: max_steps or max_epochs"),
    ],
)
def test_wrong_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), **settings)


def test_a_schedule_that_nobody_told_the_number_of_steps_says_how_to() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Schedule(optimizer)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"total_steps=self\.trainer\.estimated_stepping_batches"):
        schedule.step()


# ------------------------------------------------------------------------------------------------- under a Trainer


class Scheduled(TinyModule):
    def __init__(self, **settings: Any) -> None:
        super().__init__(num_hidden_layers=1)
        self.settings = settings
        self.rates: list[tuple[int, float]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.rates.append((self.trainer.global_step, self.trainer.optimizers[0].param_groups[0]["lr"]))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": Schedule(optimizer, **self.settings), "interval": "step"}]


def fit(root: Path, resume: Path | None = None, batch_size: int = 2, **settings: Any) -> dict[int, float]:
    """The learning rate of each optimizer step, of 14 samples per epoch."""
    module = Scheduled(shape="linear", warmup=3)
    trainer = quiet(root, strategy="ep", devices=1, accelerator="cpu", limit_val_batches=0, **settings)
    trainer.fit(module, ResumableLoader(Samples(14), batch_size), ckpt_path=resume)
    return dict(module.rates)


def expected(steps: int) -> dict[int, float]:
    return dict(enumerate(rates(steps, 0.01, shape="linear", warmup=3)))


RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "epochs": ({"max_epochs": 3}, 21),
    "steps": ({"max_steps": 10}, 10),
    "both, steps end it": ({"max_epochs": 3, "max_steps": 10}, 10),
    "both, epochs end it": ({"max_epochs": 1, "max_steps": 10}, 7),
    "limited": ({"max_epochs": 3, "limit_train_batches": 4}, 12),
    "accumulated": ({"max_epochs": 3, "accumulate_grad_batches": 3}, 9),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_last_step_is_the_last_of_the_schedule(name: str, tmp_path: Path) -> None:
    settings, steps = RUNS[name]
    assert fit(tmp_path, **settings) == pytest.approx(expected(steps))


def test_windows_that_change_with_the_epoch_are_counted(tmp_path: Path) -> None:
    windows = GradientAccumulationScheduler({0: 1, 1: 2, 2: 7})
    assert fit(tmp_path, max_epochs=4, callbacks=[windows]) == pytest.approx(expected(7 + 4 + 1 + 1))


def keep(root: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(root, filename="{step}", save_top_k=-1, **when)


@pytest.mark.parametrize(
    ("name", "step"), [("epochs", 3), ("epochs", 7), ("epochs", 9), ("epochs", 14), ("accumulated", 3)]
)
def test_resumed_runs_go_on_as_if_nothing_had_been(name: str, step: int, tmp_path: Path) -> None:
    settings, steps = RUNS[name]
    fit(tmp_path, callbacks=[keep(tmp_path, every_n_train_steps=step)], **settings)
    found = fit(tmp_path, tmp_path / f"step={step}.ckpt", **settings)
    assert found == pytest.approx({number: rate for number, rate in expected(steps).items() if number >= step})


def test_resumed_runs_of_another_length_end_with_their_own_last_step(tmp_path: Path) -> None:
    fit(tmp_path, callbacks=[keep(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True)], max_epochs=2)
    found = fit(tmp_path, tmp_path / "step=7.ckpt", max_epochs=4)
    assert found == pytest.approx({number: rate for number, rate in expected(28).items() if number >= 7})


def test_a_resumed_epoch_counts_as_this_run_cuts_it(tmp_path: Path) -> None:
    fit(tmp_path, callbacks=[keep(tmp_path, every_n_train_steps=3)], max_epochs=2)
    found = fit(tmp_path, tmp_path / "step=3.ckpt", batch_size=1, max_epochs=2)
    steps = 3 + (14 - 3 * 2) + 14
    assert found == pytest.approx({number: rate for number, rate in expected(steps).items() if number >= 3})


class Asking(TinyModule):
    """As Lightning recommends; it makes the loaders before they are given their positions."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        steps = self.trainer.estimated_stepping_batches
        assert steps == 14
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)]


@pytest.mark.parametrize("kind", [ResumableLoader, DataLoader])
def test_a_module_that_asks_for_the_number_of_steps_itself_resumes_at_its_sample(kind: Any, tmp_path: Path) -> None:
    def run(resume: Path | None = None) -> list[int]:
        module, saves = Asking(num_hidden_layers=1), keep(tmp_path, every_n_train_steps=3)
        settings: dict[str, Any] = {"strategy": "ep", "devices": 1, "accelerator": "cpu", "limit_val_batches": 0}
        trainer = quiet(tmp_path, max_epochs=2, callbacks=[saves], **settings)
        trainer.fit(module, kind(Samples(14), 2, shuffle=True), ckpt_path=resume)
        return module.seen

    torch.manual_seed(0)
    whole = run()
    torch.manual_seed(1)
    assert run(tmp_path / "step=3.ckpt") == whole[6:]


def test_recipes_may_name_it(tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {class_path: lightning_ep.CausalLM, init_args: {model: tiny, lr_scheduler: {class_path: "
        "lightning_ep.Schedule, init_args: {shape: wsd, warmup: 0.03, decay: 0.2}}}}\n"
    )
    with pytest.raises(SystemExit) as done:
        run(["fit", "--config", str(recipe), "--print_config"], "lightning-ep")
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert "lightning_ep.Schedule" in printed
    assert "warmup: 0.03" in printed
