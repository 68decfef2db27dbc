"""Ranks take the same number of steps whatever their loaders hold; predict returns every sample once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_ep import ExpertParallelStrategy
from tests.distributed import run_ranks
from tests.tiny import Samples, TinyModule, quiet


class _Stream(IterableDataset):
    """As many samples as it is told, without a length."""

    def __init__(self, size: int, first: int) -> None:
        self.samples = Samples(size, first)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from (self.samples[i] for i in range(self.samples.size))


class _Module(TinyModule):
    """Counts its steps, and predicts the id of each sample after a forward that needs every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluated = 0

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.loss(batch)
        self.evaluated += 1

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> list[int]:
        self.model(input_ids=batch["input_ids"])
        return batch["id"].tolist()


def _rank() -> int:
    return int(os.environ["RANK"])


def _predict(ep: int, sizes: list[int], batch_size: int, arguments: dict[str, Any]) -> list[list[int]]:
    trainer = quiet(Path("."), strategy=ExpertParallelStrategy(ep=ep), **arguments)
    loaders = [DataLoader(Samples(n, first=100 * i), batch_size=batch_size) for i, n in enumerate(sizes)]
    found = trainer.predict(_Module(), loaders if len(loaders) > 1 else loaders[0])
    found = found if len(loaders) > 1 else [found or []]
    return [[sample for batch in one for sample in batch] for one in found]


@pytest.mark.parametrize(
    ("ep", "sizes", "batch_size", "expected"),
    [
        (4, [9], 1, [9]),
        (2, [9], 2, [9]),
        (4, [5, 6], 1, [5, 6]),
    ],
)
def test_predict_returns_each_sample_once(ep: int, sizes: list[int], batch_size: int, expected: list[int]) -> None:
    ranks = run_ranks(4, _predict, ep, sizes, batch_size, {}, init_process_group=False)
    for index, count in enumerate(expected):
        assert sorted(sample for rank in ranks for sample in rank[index]) == [100 * index + i for i in range(count)]


def test_predict_with_a_limit() -> None:
    ranks = run_ranks(2, _predict, 2, [5], 1, {"limit_predict_batches": 2}, init_process_group=False)
    assert [len(rank[0]) for rank in ranks] == [2, 2]


def _unequal(sized: bool) -> dict[str, Any]:
    """Rank 0 has 5 batches, rank 1 has 3."""
    size = 5 if _rank() == 0 else 3

    def make() -> DataLoader:
        data = Samples(size, 10 * _rank()) if sized else _Stream(size, 10 * _rank())
        return DataLoader(data, batch_size=1)

    module = _Module()
    trainer = quiet(
        Path("."), strategy=ExpertParallelStrategy(ep=2), use_distributed_sampler=False, max_epochs=2, max_steps=-1,
        num_sanity_val_steps=1,
    )  # fmt: skip
    trainer.fit(module, make(), make())
    fitted, evaluated = trainer.global_step, module.evaluated
    module.evaluated = 0
    trainer.validate(module, make(), verbose=False)
    validated, module.evaluated = module.evaluated, 0
    trainer.test(module, make(), verbose=False)
    predicted = [i for batch in trainer.predict(module, make()) for i in batch]
    return {"fit": fitted, "val in fit": evaluated, "validate": validated, "test": module.evaluated, "ids": predicted}


@pytest.mark.parametrize("sized", [True, False])
def test_loaders_of_unequal_length_stop_together(sized: bool) -> None:
    first, second = run_ranks(2, _unequal, sized, init_process_group=False)
    assert first["ids"] == [0, 1, 2, 3, 4]
    assert second["ids"] == [10, 11, 12]
    first.pop("ids"), second.pop("ids")
    # Three steps in each of two epochs; a sanity step and two validations of three.
    assert first == second == {"fit": 6, "val in fit": 7, "validate": 3, "test": 3}


def _samples_of_rank() -> list[int]:
    module = _Module()
    trainer = quiet(Path("."), strategy=ExpertParallelStrategy(ep=2), max_epochs=1, max_steps=-1)
    trainer.fit(module, DataLoader(Samples(8), batch_size=2))
    assert dist.get_world_size() == 4
    return module.seen


def test_lightnings_sampler_follows_the_data_ranks() -> None:
    ranks = run_ranks(4, _samples_of_rank, init_process_group=False)
    assert sorted(sample for rank in ranks for sample in rank) == list(range(8))


def test_lockstep_leaves_equal_loaders_alone() -> None:
    from lightning_ep.lockstep import lockstep

    loader = DataLoader(torch.arange(4))
    assert lockstep(loader, lambda value: [value, value]) is loader
    with pytest.warns(UserWarning, match=r"\[4, 2\] batches; all ranks stop after 2"):
        assert len(lockstep(loader, lambda value: [value, 2])) == 2
