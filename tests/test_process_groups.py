"""Process groups of the Trainers of one process: made once, also for runs inside of one another."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from lightning_ep import ExpertParallelStrategy
from lightning_ep.checkpoint import saver
from lightning_ep.layout import ParallelLayout
from tests.rank_process import on_cuda
from tests.ranks import run_ranks
from tests.tiny import TinyModule, loader, quiet


def _fit(
    root: Path, *callbacks: Callback, ep: int = 2, module: L.LightningModule | None = None, **overrides: Any
) -> L.Trainer:
    strategy = ExpertParallelStrategy(ep=ep, **overrides)
    trainer = quiet(root, strategy=strategy, max_steps=2, callbacks=list(callbacks), enable_checkpointing=False)
    trainer.fit(module or TinyModule(), loader(8))
    trainer.save_checkpoint(root / "model.ckpt")
    return trainer


def _groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def _sweep(root: Path) -> list[int]:
    counted = []
    for run, options in enumerate([{}, {}, {"async_save": True}, {"ep": 1}, {"ep": 1}, {}]):
        trainer = _fit(root / str(run), **options)
        trainer.validate(TinyModule(), loader(4), verbose=False)
        counted.append(_groups())
    return counted


def test_a_sweep_in_one_process_makes_the_groups_of_each_layout_once(tmp_path: Path) -> None:
    """Each new Trainer kept four more, with threads, and communicators on GPUs, to the end of the process."""
    for first, *others in run_ranks(2, _sweep, tmp_path, init_process_group=False):
        *same_layout, other, again, at_last = others
        assert same_layout == [first] * 2
        assert other > first
        assert [again, at_last] == [other] * 2


class _FitsAnother(Callback):
    """Trains and saves another model between the steps, while a checkpoint of the first is being written behind."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        root = Path(trainer.default_root_dir)
        trainer.save_checkpoint(root / f"outer-{batch_idx}.ckpt")
        _fit(root / f"inner-{batch_idx}", async_save=True)


def _nested(root: Path) -> tuple[list[str], dict[str, float]]:
    trainer = _fit(root, _FitsAnother(), async_save=True)
    saved = sorted(str(path.relative_to(root)) for path in root.rglob("*.ckpt"))
    sums = {}
    for path in saved:
        module = TinyModule()
        quiet(root, strategy=ExpertParallelStrategy(ep=2)).validate(
            module, loader(4), ckpt_path=str(root / path), verbose=False
        )
        sums[path] = sum(parameter.full_tensor().double().abs().sum().item() for parameter in module.parameters())
    last = trainer.lightning_module.parameters()
    sums["the model"] = sum(parameter.full_tensor().double().abs().sum().item() for parameter in last)
    return saved, sums


def test_a_run_inside_of_another_uses_its_groups_beside_what_is_written_behind(tmp_path: Path) -> None:
    for saved, sums in run_ranks(2, _nested, tmp_path, init_process_group=False):
        assert saved == ["inner-0/model.ckpt", "inner-1/model.ckpt", "model.ckpt", "outer-0.ckpt", "outer-1.ckpt"]
        assert sums["model.ckpt"] == sums["outer-1.ckpt"] == sums["the model"] != sums["outer-0.ckpt"]


class _TriesAnother(Callback):
    """Fits another model between the steps, which may fail, while a checkpoint of the first cannot be written."""

    def __init__(self, inner: L.LightningModule) -> None:
        self.inner = inner
        self.ended: list[str] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step > 1:
            return
        root, written = Path(trainer.default_root_dir), saver.write_shards

        def full(*args: Any) -> Any:
            if args[2].parent == root:
                time.sleep(0.5)
                raise saver.CheckpointError("No space left on device")
            return written(*args)

        saver.write_shards = full
        trainer.save_checkpoint(root / "outer.ckpt")
        try:
            _fit(root / "inner", module=self.inner)
        except ValueError as error:
            self.ended.append(str(error))


class _Diverges(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise ValueError("diverged")


def _failing(root: Path) -> list[Any]:
    found: list[Any] = []
    for name, inner in (("good", TinyModule()), ("bad", _Diverges())):
        tries = _TriesAnother(inner)
        try:
            _fit(root / name, tries, async_save=True)
        except saver.CheckpointError as error:
            found.append("outer.ckpt could not be saved" in str(error))
        found += [tries.ended, (root / name / "inner" / "model.ckpt").is_dir()]
    return found


def test_a_checkpoint_that_fails_is_told_to_its_own_run(tmp_path: Path) -> None:
    expected = [True, [], True, True, ["diverged"], False]
    assert run_ranks(2, _failing, tmp_path, init_process_group=False) == [expected] * 2


class _Stalls(TinyModule):
    """Rank 0 is late for an exchange of tokens by more than the time-out."""

    def on_fit_start(self) -> None:
        def stall(*_: Any) -> None:
            if dist.get_rank() == 0:
                time.sleep(8)

        self.model.model.layers[0].post_attention_layernorm.register_forward_hook(stall)


def _times_out(root: Path) -> list[bool]:
    ended = []
    for number, module in enumerate((_Stalls(), TinyModule())):
        try:
            _fit(root / str(number), module=module, timeout=timedelta(seconds=6))
            ended.append(True)
        except RuntimeError:
            ended.append(False)
    return ended


@pytest.mark.skipif(on_cuda(), reason="NCCL ends the process")
def test_groups_of_a_run_that_failed_are_made_anew(tmp_path: Path) -> None:
    assert run_ranks(2, _times_out, tmp_path, init_process_group=False) == [[False, True]] * 2


def _after_the_default_group(root: Path) -> list[bool]:
    layout, meshes = ParallelLayout.resolve(2, "auto", 2, 2), []
    for name in ("first", "second"):
        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo", store=dist.FileStore(str(root / name), 2), rank=rank, world_size=2)
        meshes += [layout.build_meshes("cpu"), layout.build_meshes("cpu")]
        dist.all_reduce(torch.ones(1), group=meshes[-1].expert["ep"].get_group())
        dist.destroy_process_group()
    first, same, other, again = meshes
    with pytest.raises(ValueError, match="not been initialized"):
        layout.build_meshes("cpu")
    return [first is same, first is other, other is again]


@pytest.mark.skipif(on_cuda(), reason="torch 2.11 breaks once the default group of NCCL has been made again")
def test_groups_end_with_the_default_one(tmp_path: Path) -> None:
    assert run_ranks(2, _after_the_default_group, tmp_path, init_process_group=False) == [[True, False, True]] * 2
