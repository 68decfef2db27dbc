"""A run that is interrupted and resumed, in mid-epoch too, has the losses of one that was not, bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ep import CausalLM, ExpertParallelStrategy, ParallelLayout
from lightning_ep.checkpoint import files
from lightning_ep.checkpoint.metadata import place_ranks
from lightning_ep.data import TextDataModule
from lightning_ep.hub.errors import CheckpointError
from tests.ranks import run_ranks
from tests.reference import tiny_config
from tests.tiny import TinyModule, loader, quiet

STEPS = 7


class _Losses(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_before_zero_grad(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if "train/loss" in trainer.callback_metrics:
            self.losses.append(trainer.callback_metrics["train/loss"].item())


class _NotesOptimizers(TinyModule):
    optimizers_made = False

    def configure_optimizers(self) -> Any:
        self.optimizers_made = True
        return super().configure_optimizers()


def _fit(root: Path, steps: int, resume: str | None, save_at: int | None, ep: int = 2, **options: Any) -> list[float]:
    L.seed_everything(3, verbose=False)
    losses = _Losses()
    checkpoint = ModelCheckpoint(root / "saved", filename="{step}", every_n_train_steps=save_at or 1000, save_top_k=-1)
    batch_size = options.pop("batch_size", 2)
    dropout = options.pop("dropout", 0.0)
    accumulate = options.pop("accumulate", 1)
    trainer = quiet(
        root,
        strategy=ExpertParallelStrategy(ep=ep, **options),
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        callbacks=[losses, checkpoint],
    )
    module = CausalLM(
        tiny_config(vocab_size=260, attention_dropout=dropout),
        pretrained=False,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=10),
    )
    data = TextDataModule(
        str(root / "text"), sequence_length=16, batch_size=batch_size, vocab_size=260, validation_fraction=0.3,
        cache_dir=str(root / "cache"),
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    assert trainer.global_step == steps
    return losses.losses


def _runs(root: Path, save_at: int, options: dict[str, Any]) -> tuple[list[float], list[float]]:
    whole = _fit(root, STEPS, None, save_at, **options)
    rest = _fit(root, STEPS, str(root / "saved" / f"step={save_at}.ckpt"), None, **options)
    return whole, rest


def _write_text(root: Path) -> None:
    text = root / "text"
    text.mkdir()
    for index in range(4):
        (text / f"{index}.txt").write_text(
            f"the quick brown fox {index} jumps over {index * 7} lazy dogs\n" * (2 + index)
        )


@pytest.mark.parametrize(
    ("save_at", "options"),
    [
        (2, {}),
        (5, {"dropout": 0.2}),
        (2, {"save_distributed_checkpoint": False, "dropout": 0.2}),
        (2, {"accumulate": 2, "async_save": True}),
        (3, {"save_distributed_checkpoint": False, "async_save": True}),
    ],
    ids=str,
)
def test_losses_after_a_resume(tmp_path: Path, save_at: int, options: dict[str, Any]) -> None:
    _write_text(tmp_path)
    (whole, rest), (other, _) = run_ranks(2, _runs, tmp_path, save_at, options, init_process_group=False)
    assert whole == other
    assert len(set(whole)) == len(whole) >= STEPS - 1
    assert rest[-(STEPS - save_at - 1) :] == whole[-(STEPS - save_at - 1) :]


@pytest.mark.parametrize("resumed", [(1, 4), pytest.param((4, 1), marks=pytest.mark.slow)])
def test_losses_on_another_number_of_data_ranks(tmp_path: Path, resumed: tuple[int, int]) -> None:
    """The same global batches, cut for 1, 2 and 4 ranks, whatever was cut before the checkpoint."""
    _write_text(tmp_path)
    whole = run_ranks(2, _fit, tmp_path, STEPS, None, 2, init_process_group=False)[0]
    path = str(tmp_path / "saved" / "step=2.ckpt")
    ranks, batch_size = resumed
    rest = run_ranks(ranks, _resume_scaled, tmp_path, path, ranks, batch_size, init_process_group=False)[0]
    assert len(rest) >= STEPS - 2 - 1
    assert rest[-(STEPS - 3) :] == pytest.approx(whole[-(STEPS - 3) :], rel=1e-4)


def _resume_scaled(root: Path, path: str, ep: int, batch_size: int) -> list[float]:
    return _fit(root, STEPS, path, None, ep, batch_size=batch_size)


class _Counter(L.Callback):
    """A callback with a state."""

    def __init__(self) -> None:
        self.steps, self.seen = 0, torch.zeros(2)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps += 1
        self.seen += trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.seen = state["steps"], state["seen"]


class _WithExtraState(TinyModule):
    """State that is no parameter: a buffer of integers, an object's, and what hooks add."""

    def __init__(self, dtype: torch.dtype = torch.int64) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3, dtype=dtype))
        self.extra: dict[str, Any] = {}
        self.hook = ""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.count += 1
        self.extra["last"] = batch_idx
        loss = super().training_step(batch, batch_idx)
        self.log("shared_loss", loss, sync_dist=True)
        return loss

    def get_extra_state(self) -> dict[str, Any]:
        return dict(self.extra)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.extra = state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = f"step {self.trainer.global_step}"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.hook = checkpoint["mine"]


def _extra_state(root: Path, distributed: bool) -> tuple[Any, ...]:
    def trainer(*callbacks: L.Callback) -> L.Trainer:
        strategy = ExpertParallelStrategy(ep=2, save_distributed_checkpoint=distributed)
        return quiet(root, strategy=strategy, callbacks=list(callbacks), max_steps=3)

    def best() -> ModelCheckpoint:
        return ModelCheckpoint(root, monitor="shared_loss", filename="{step}", save_top_k=2, every_n_train_steps=1)

    keep, path = best(), root / "again.ckpt"
    first = trainer(_Counter(), keep)
    first.fit(_WithExtraState(), loader())
    first.save_checkpoint(path)
    counter, kept, module = _Counter(), best(), _WithExtraState()
    trainer(counter, kept).fit(module, loader(), ckpt_path=path)
    assert kept.best_model_path == keep.best_model_path
    if first.is_global_zero:  # whose callbacks are saved
        assert kept.best_k_models == keep.best_k_models
    with pytest.raises(CheckpointError, match=r"of another dtype: count torch\.int64 instead of torch\.float32"):
        trainer().validate(_WithExtraState(torch.float32), loader(2), ckpt_path=path, verbose=False)
    return counter.steps, counter.seen.tolist(), module.count.tolist(), module.extra, module.hook


@pytest.mark.parametrize("distributed", [True, False])
def test_state_that_is_no_weight_comes_back(tmp_path: Path, distributed: bool) -> None:
    for found in run_ranks(2, _extra_state, tmp_path, distributed, init_process_group=False):
        assert found == (3, [6.0, 6.0], [3, 3, 3], {"last": 2}, "step 3")


def _newer(root: Path) -> None:
    for distributed in (True, False):
        strategy = ExpertParallelStrategy(ep=2, save_distributed_checkpoint=distributed)
        trainer = quiet(root, strategy=strategy, max_steps=1)
        trainer.fit(TinyModule(), loader())
        path = root / f"{distributed}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            meta = path / files.META if distributed else path
            content = torch.load(meta, weights_only=True)
            content["lightning_ep"]["format"] = files.FORMAT + 1
            torch.save(content, meta)
            if distributed:
                files.delete(path / files.MANIFEST)
                files.write_manifest(path, {file.name: files.checksum(file) for file in path.iterdir()})
        torch.distributed.barrier()
        with pytest.raises(CheckpointError, match=f"format {files.FORMAT + 1}.*upgrade"):
            quiet(root).validate(TinyModule(), loader(2), ckpt_path=path, verbose=False)


def test_fewer_epochs_than_are_done_are_refused_before_anything_is_sharded(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "saved", save_last="link")
    quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1), max_epochs=2, callbacks=[checkpoint]).fit(
        TinyModule(), loader(4)
    )
    module = _NotesOptimizers()
    trainer = quiet(
        tmp_path,
        strategy=ExpertParallelStrategy(ep=1),
        max_epochs=1,
        callbacks=[ModelCheckpoint(tmp_path / "saved", save_last="link")],
    )
    said = r"last\.ckpt is of epoch 2 of its run, .* max_epochs=1, .* Set max_epochs to 3 for 1 more"
    with pytest.raises(CheckpointError, match=said):
        trainer.fit(module, loader(4), ckpt_path="last")
    assert not module.optimizers_made
    again = quiet(
        tmp_path,
        strategy=ExpertParallelStrategy(ep=1),
        max_epochs=3,
        callbacks=[ModelCheckpoint(tmp_path / "saved", save_last="link")],
    )
    again.fit(TinyModule(), loader(4), ckpt_path="last")
    assert again.current_epoch == 3
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["epoch=2-step=6.ckpt", "last.ckpt"]


def test_last_is_the_newest_of_several_runs_and_loses_none(tmp_path: Path) -> None:
    def run(save_last: Any) -> Any:
        keep = ModelCheckpoint(tmp_path, filename="{step}", save_last=save_last)
        trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1), max_epochs=1, callbacks=[keep])
        trainer.fit(TinyModule(), loader(4))
        return keep.last_model_path, (tmp_path / "last.ckpt").resolve().name

    assert [run("link"), run("link")] == [
        (str(tmp_path / "last.ckpt"), "step=2.ckpt"),
        (str(tmp_path / "last.ckpt"), "step=2-v1.ckpt"),
    ]
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"last.ckpt", "step=2.ckpt", "step=2-v1.ckpt"}
    (tmp_path / "last.ckpt").unlink()
    run(True)
    with pytest.warns(UserWarning, match=r"last\.ckpt is another run's and stays: .*as last-v1\.ckpt\. With"):
        assert run(True) == (str(tmp_path / "last-v1.ckpt"), "last.ckpt")
    with pytest.warns(UserWarning, match=r"last\.ckpt is another run's and stays: .* no link, which would move on"):
        assert run("link") == (str(tmp_path / "last-v2.ckpt"), "last.ckpt")


def test_last_is_a_link_from_a_run_that_ends_before_its_first_checkpoint(tmp_path: Path) -> None:
    for expected in ("step=1.ckpt", "step=1-v1.ckpt", "step=2.ckpt"):
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_last="link")
        steps = int(expected[5])
        trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1), max_steps=steps, callbacks=[keep])
        trainer.fit(TinyModule(), loader(8))
        assert (tmp_path / "last.ckpt").is_symlink()
        assert (tmp_path / "last.ckpt").resolve().name == expected


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    run_ranks(2, _newer, tmp_path, init_process_group=False)


def test_ranks_that_share_batches_take_the_position_of_their_data_rank() -> None:
    trainer: Any = SimpleNamespace(datamodule=None)
    ranks = [{"loops": {"sample": sample}, "datamodule": None, "random": sample} for sample in (3, 7)]

    def placed(layout: ParallelLayout) -> list[tuple[Any, Any]]:
        found = []
        for rank in range(layout.world_size):
            metadata: dict[str, Any] = {"lightning_ep": {"layout": {"data_world_size": 2}}}
            random = place_ranks(metadata, ranks, trainer, rank, layout)
            found.append((metadata["loops"]["sample"], random))
        return found

    assert placed(ParallelLayout(2, 2)) == [(3, 3), (7, 7)]
    with pytest.warns(UserWarning, match=r"saved by 2 ranks.*resumed on 4, 2 with different data.*start anew\.$"):
        assert placed(ParallelLayout(4, 4, tp=2)) == [(3, None), (3, None), (7, None), (7, None)]
    with pytest.raises(CheckpointError, match="position of rank 1 differs"):
        placed(ParallelLayout(4, 4))
    ranks = [rank for rank in ranks for _ in range(2)]  # saved by two peers each
    assert placed(ParallelLayout(4, 4, cp=2)) == [(3, 3), (3, 3), (7, 7), (7, 7)]
    with pytest.warns(UserWarning, match="saved by 4 ranks"):
        assert placed(ParallelLayout(2, 2)) == [(3, None), (7, None)]
