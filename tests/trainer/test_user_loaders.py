"""Loaders of a user's module under the Trainer, in two ranks: positions, numbers of steps, random transforms."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_ep import CausalLM, ExpertParallelStrategy
from lightning_ep.data import ResumableLoader
from tests.reference import tiny_config, tiny_model
from tests.rows import RowFailures, Rows, refused
from tests.tiny import SMALL, Samples, TinyModule, loader, quiet

row = Rows()


class _Epochs(TinyModule):
    """Three batches per epoch from a loader that can resume; notes what came in which epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.came: list[tuple[int, list[int]]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.came.append((self.trainer.current_epoch, batch["id"].tolist()))
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> ResumableLoader:
        strategy: Any = self.trainer.strategy
        return ResumableLoader(Samples(12), 2, strategy.data_rank, strategy.data_world_size, shuffle=True, seed=1)


def _every(root: Path, steps: int) -> ModelCheckpoint:
    return ModelCheckpoint(root, every_n_train_steps=steps, save_top_k=-1, filename="{step}")


@row()
def a_resumable_loader_after_a_finished_epoch(root: Path) -> None:
    for flags in ({"max_steps": 8}, {"max_epochs": 3}, {"max_epochs": 3, "max_steps": 100}):
        keep = ModelCheckpoint(root / str(flags), every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        quiet(root, callbacks=[keep], **flags).fit(straight := _Epochs())
        quiet(root, **flags).fit(resumed := _Epochs(), ckpt_path=root / str(flags) / "epoch=0.ckpt")
        assert resumed.came == straight.came[3:], flags


@row()
def a_resumable_loader_twice_after_an_epochs_last_batch(root: Path) -> None:
    quiet(root, callbacks=[_every(root / "one", 3)], max_steps=12).fit(straight := _Epochs())
    quiet(root, callbacks=[_every(root / "two", 3)], max_steps=12).fit(_Epochs(), ckpt_path=root / "one/step=3.ckpt")
    quiet(root, max_steps=12).fit(resumed := _Epochs(), ckpt_path=root / "two/step=6.ckpt")
    assert resumed.came == straight.came[6:]


@row()
def a_resumable_loader_in_mid_epoch_on_another_number_of_data_ranks(root: Path) -> None:
    """One data rank of two processes: their batches come one after the other."""
    quiet(root, callbacks=[_every(root, 4)], max_steps=9).fit(straight := _Epochs())
    strategy = ExpertParallelStrategy(ep=2, tp=2)
    quiet(root, strategy=strategy, max_epochs=3).fit(resumed := _Epochs(), ckpt_path=root / "step=4.ckpt")
    shares: list[Any] = [None, None]
    dist.all_gather_object(shares, straight.came[4:])
    assert resumed.came == [share for step in zip(*shares, strict=True) for share in step]


@row()
def predict_joins_a_loader_with_its_index(root: Path) -> None:
    calls: list[tuple[int, int, list[int]]] = []

    class Indexed(TinyModule):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {**batch, "loader": torch.tensor(dataloader_idx)}

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
            calls.append((dataloader_idx, batch_idx, batch["id"].tolist()))
            assert batch["loader"] == dataloader_idx
            for _ in range(1 + dataloader_idx):  # a rank that took the other way would leave this one waiting
                self.loss(batch)
            return batch["id"]

    quiet(root).predict(Indexed(), [loader(4, 1), loader(5, 1, first=100)])
    first = int(os.environ["RANK"])
    last = (1, 2, [104 if first == 0 else 103])  # the sample that rank 1 has had already, once more
    expected = [(0, step, [first + 2 * step]) for step in range(2)]
    assert calls == [*expected, *((1, step, [100 + first + 2 * step]) for step in range(2)), last]


class _Stream(IterableDataset):
    """As many samples as this rank is given, without a length."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Any:
        return (
            {"input_ids": s["input_ids"], "labels": s["labels"]} for s in map(Samples(9).__getitem__, range(self.size))
        )


@row()
def an_empty_validation_stream_on_one_rank_is_called_that(root: Path) -> None:
    streams = DataLoader(_Stream(2 * (1 - int(os.environ["RANK"]))), batch_size=1)
    module = CausalLM(tiny_config(**SMALL), pretrained=False)
    for sanity_steps in (0, 1):
        trainer = quiet(root, max_steps=1, num_sanity_val_steps=sanity_steps)
        with refused("No rank took a val batch", "a loader gave nothing", "at least one batch"):
            trainer.fit(module, DataLoader(_Stream(1), batch_size=1), streams)
        assert trainer.global_step == 1


def _changed(batch: dict[str, Tensor], key: str) -> None:
    if key == "attention_mask":
        batch[key][0, :5] = 0
        batch["labels"][0, :6] = -100
    else:
        batch[key][:, 5:] -= 5  # another document begins


class _Changes(TinyModule):
    """Changes what describes the documents of a batch, after it has come to the device."""

    def __init__(self, key: str, where: str) -> None:
        super().__init__()
        self.key, self.where, self.found = key, where, 0.0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if "replaced" in self.where:
            batch = {name: value.clone() for name, value in batch.items()}
        if "hook" in self.where:
            _changed(batch, self.key)
        return batch

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        strategy: Any = self.trainer.strategy
        if "step" in self.where:
            _changed(batch, self.key)
        loss = self.model(**strategy.shard_sequence(batch), use_cache=False).loss
        self.found = strategy.reduce(loss, reduce_op="mean").item()


@row()
def documents_that_change_on_the_device_under_context_parallelism(root: Path) -> None:
    ids = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    rows = {"attention_mask": torch.ones(2, 12).long(), "position_ids": torch.arange(12).repeat(2, 1)}
    for key, value in rows.items():
        expected = {"input_ids": ids, "labels": ids.clone(), key: value.clone()}
        _changed(expected, key)
        loss = tiny_model(**SMALL)(**expected, use_cache=False).loss.item()
        for where in ("hook", "replaced in hook", "step", "replaced, step"):
            batch = {"input_ids": ids.clone(), "labels": ids.clone(), key: value.clone()}
            trainer = quiet(root, strategy=ExpertParallelStrategy(ep=2, cp=2), num_sanity_val_steps=0)
            trainer.validate(module := _Changes(key, where), DataLoader([batch], batch_size=None), verbose=False)
            assert module.found == pytest.approx(loss, rel=1e-5), (key, where)


class _Random(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 128, (8,))
        return {"id": torch.tensor(index), "input_ids": ids, "labels": ids}


@row()
def workers_of_tensor_parallel_peers_draw_the_same(root: Path) -> None:
    for tp, alike in ((2, True), (1, False)):
        L.seed_everything(1, workers=True, verbose=False)
        batches: list[Tensor] = []

        class Keeps(TinyModule):
            def training_step(self, batch: Any, batch_idx: int, batches: list[Tensor] = batches) -> Tensor:
                batches.append(batch["input_ids"].cpu())
                return super().training_step(batch, batch_idx)

        data = DataLoader(_Random(), batch_size=1, num_workers=1)
        quiet(root, strategy=ExpertParallelStrategy(ep=2, tp=tp), max_epochs=1).fit(Keeps(), data)
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            os.environ.pop(name)
        both: list[Any] = [None, None]
        dist.all_gather_object(both, torch.cat(batches))
        assert torch.equal(*both) == alike, tp


@pytest.mark.parametrize("name", row)
def test_works_or_is_refused(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
