"""Loaders: predict gives each sample once; ranks whose data ends early do not leave the others in a collective."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lightning_ep import ExpertParallelStrategy
from lightning_ep.trainer.uneven_inputs import with_equal_steps
from tests.ranks import RankFailure, run_ranks
from tests.tiny import Samples, TinyModule, loader, quiet


def _trainer(root: Path, ep: int, **overrides: Any) -> L.Trainer:
    return quiet(root, strategy=ExpertParallelStrategy(ep=ep), **overrides)


def _rank() -> int:
    return int(os.environ["RANK"])


class Stream(IterableDataset):
    """``size`` samples, and no length."""

    def __init__(self, size: int, first: int = 0) -> None:
        self.samples = Samples(size, first)

    def __iter__(self) -> Iterator[Any]:
        return iter([self.samples[index] for index in range(len(self.samples))])


class Steps(L.Callback):
    """Batches taken in each stage."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.counts["train"] += 1

    def on_validation_batch_end(self, *_: Any) -> None:
        self.counts["val"] += 1

    def on_test_batch_end(self, *_: Any) -> None:
        self.counts["test"] += 1

    def on_predict_batch_end(self, *_: Any) -> None:
        self.counts["predict"] += 1


# ---------------------------------------------------------------------------------------------------- predict


class Writer(BasePredictionWriter):
    """Keeps what it is asked to write."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[int] = []
        self.epoch: list[int] = []
        self.mismatched: list[Any] = []

    def write_on_batch_end(
        self, trainer: L.Trainer, module: Any, prediction: Any, indices: Any, batch: Any, *_: int
    ) -> None:
        self.batches += prediction.tolist()
        if indices != prediction.tolist():
            self.mismatched.append((indices, prediction.tolist()))

    def write_on_epoch_end(self, trainer: L.Trainer, module: Any, predictions: Any, batch_indices: Any) -> None:
        self.epoch += [index for batch in batch_indices[0] for index in batch]


def _predict(root: Path, ep: int) -> dict[str, Any]:
    """What each case's predictions are, on this rank."""
    found: dict[str, Any] = {}
    module = TinyModule()
    for batch_size in (1, 2):
        ids = _trainer(root, ep).predict(module, loader(9, batch_size))
        found[f"batches of {batch_size}"] = [i for batch in ids for i in batch.tolist()]
    ids = _trainer(root, ep, limit_predict_batches=1).predict(module, loader(9, 2))
    found["limit 1"] = [i for batch in ids for i in batch.tolist()]
    ids = _trainer(root, ep, limit_predict_batches=2).predict(module, loader(9, 1))
    found["limit 2"] = [i for batch in ids for i in batch.tolist()]
    first, second = _trainer(root, ep).predict(module, [loader(5, 1), loader(6, 1, first=100)])
    found["two loaders"] = [i for batches in (first, second) for batch in batches for i in batch.tolist()]
    writer = Writer()
    _trainer(root, ep, callbacks=[writer]).predict(module, loader(9, 2), return_predictions=False)
    assert not writer.mismatched, writer.mismatched
    found["written by batch"], found["written by epoch"] = writer.batches, writer.epoch
    # Own shares of unequal size, sized and not; rank 0 of the second has nothing to predict.
    rank = dist.get_rank()
    mine = DataLoader(Samples(rank + 1, first=10 * rank), batch_size=1)
    ids = _trainer(root, ep, use_distributed_sampler=False).predict(module, mine)
    found["own sized shares"] = [i for batch in ids for i in batch.tolist()]
    mine = DataLoader(Stream(rank + 1, first=10 * rank), batch_size=1)
    ids = _trainer(root, ep).predict(module, mine)
    found["own streams"] = [i for batch in ids for i in batch.tolist()]
    return found


@pytest.mark.parametrize("ep", [4, 2])
def test_predict_returns_each_sample_once(ep: int, tmp_path: Path) -> None:
    ranks = run_ranks(4, _predict, tmp_path, ep, init_process_group=False)
    found = {case: sorted(i for rank in ranks for i in rank[case]) for case in ranks[0]}
    shares = sorted(10 * rank + i for rank in range(4) for i in range(rank + 1))
    assert found == {
        "batches of 1": list(range(9)),
        "batches of 2": list(range(9)),
        "limit 1": list(range(8)),
        "limit 2": list(range(8)),
        "two loaders": [0, 1, 2, 3, 4, 100, 101, 102, 103, 104, 105],
        "written by batch": list(range(9)),
        "written by epoch": list(range(9)),
        "own sized shares": shares,
        "own streams": shares,
    }


def _predict_few(root: Path, ep: int, samples: int) -> list[int]:
    ids = _trainer(root, ep).predict(TinyModule(), loader(samples, 1))
    return [i for batch in ids for i in batch.tolist()]


@pytest.mark.parametrize(("ep", "samples"), [(4, 2), (2, 2), (4, 1)])
def test_predict_with_fewer_samples_than_ranks(ep: int, samples: int, tmp_path: Path) -> None:
    ranks = run_ranks(4, _predict_few, tmp_path, ep, samples, init_process_group=False, timeout=40)
    assert sorted(i for rank in ranks for i in rank) == list(range(samples))


def _predict_limited(root: Path) -> dict[str, Any]:
    rank = _rank()
    found: dict[str, Any] = {}
    cases: dict[str, tuple[float, Any, bool]] = {
        "half of the sampler's": (0.5, loader(5, 1), True),
        "half of own shares": (0.5, DataLoader(Samples((8, 4)[rank], first=10 * rank), batch_size=1), False),
        "half, one rank ends before": (0.5, DataLoader(Samples((8, 1)[rank], first=10 * rank), batch_size=1), False),
        "two of a stream": (2, DataLoader(Stream((5, 1)[rank], first=10 * rank), batch_size=1), False),
    }
    for case, (limit, data, sampler) in cases.items():
        trainer = _trainer(root, 2, limit_predict_batches=limit, use_distributed_sampler=sampler)
        found[case] = [i for batch in trainer.predict(TinyModule(), data) for i in batch.tolist()]
    return found


def test_predict_with_limits_where_ranks_have_unequal_shares(tmp_path: Path) -> None:
    # The share of the rank that has most: 5 samples on 2 ranks make 3 steps.
    assert run_ranks(2, _predict_limited, tmp_path, init_process_group=False, timeout=60) == [
        {
            "half of the sampler's": [0],
            "half of own shares": [0, 1, 2, 3],
            "half, one rank ends before": [0, 1, 2, 3],
            "two of a stream": [0, 1],
        },
        {
            "half of the sampler's": [1],
            "half of own shares": [10, 11, 12, 13],
            "half, one rank ends before": [10],
            "two of a stream": [10],
        },
    ]


class _Hidden:
    """A batch sampler of the user's: Lightning passes it a sampler, which it keeps to itself."""

    drop_last = False

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool) -> None:
        self.batch_size = batch_size
        self._batches = [[index] for index in sampler]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def _predict_own_batches(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    kept = DataLoader(Samples(5), batch_sampler=BatchSampler(range(5), 2, drop_last=True))
    own = DataLoader(Samples(5), sampler=DistributedSampler(range(5), 2, _rank(), shuffle=False))
    unbatched = DataLoader(list(DataLoader(Samples(5), batch_size=1)), batch_size=None)
    few = DataLoader(list(DataLoader(Samples(1), batch_size=1)), batch_size=None)
    for name, mine in (("kept", kept), ("own", own), ("unbatched", unbatched), ("few", few)):
        ids = _trainer(root, 2).predict(TinyModule(), mine)
        found[name] = [i for batch in ids for i in batch.tolist()]
    try:
        hidden = DataLoader(Samples(5), batch_sampler=_Hidden(range(5), 1, False))
        _trainer(root, 2).predict(TinyModule(), hidden)
    except TypeError as error:
        found["hidden"] = str(error)
    return found


def test_predict_shares_samples_whatever_batches_them(tmp_path: Path) -> None:
    one, two = run_ranks(2, _predict_own_batches, tmp_path, init_process_group=False)
    assert sorted(one["kept"] + two["kept"]) == sorted(one["unbatched"] + two["unbatched"]) == [0, 1, 2, 3, 4]
    assert (one["own"], two["own"]) == ([0, 2, 4], [1, 3, 0]), "the user's own sampler is left alone"
    assert re.search(
        r"2 ranks .* _Hidden, which does not keep it.*self.sampler.*use_distributed_sampler=False", one["hidden"]
    )


def _predict_nothing(root: Path) -> str:
    try:
        _trainer(root, 2).predict(TinyModule(), DataLoader(Stream(3 * _rank()), batch_size=1))
    except RuntimeError as error:
        return str(error)
    return "predicted"


def test_a_stream_without_any_sample_on_one_rank_is_refused(tmp_path: Path) -> None:
    try:
        message = run_ranks(2, _predict_nothing, tmp_path, init_process_group=False, alone=True, timeout=40)[0]
    except RankFailure as failure:  # the other rank waits for the one that raised, until that leaves
        message = str(failure)
    assert "Give every rank at least one batch" in message


# ---------------------------------------------------------------------------------------------------- unequal lengths


def _unequal(root: Path, ep: int, stream: bool) -> dict[str, Any]:
    rank = _rank()

    def mine(extra: int = 0) -> DataLoader:
        size = 3 + rank + extra
        return DataLoader(Stream(size) if stream else Samples(size), batch_size=1)

    steps = Steps()
    flags = {"use_distributed_sampler": False, "num_sanity_val_steps": 0}
    trainer = _trainer(root, ep, callbacks=[steps], max_epochs=2, **flags)
    module = TinyModule()
    trainer.fit(module, mine(), mine(1))
    trainer.validate(module, mine(1), verbose=False)
    trainer.test(module, mine(2), verbose=False)
    return {"steps": dict(steps.counts), "global_step": trainer.global_step, "epoch": trainer.current_epoch}


@pytest.mark.parametrize("stream", [False, True], ids=["sized", "stream"])
@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 2)])
def test_all_ranks_stop_with_the_shortest_loader(world: int, ep: int, stream: bool, tmp_path: Path) -> None:
    expected = {"steps": {"train": 6, "val": 8 + 4, "test": 5}, "global_step": 6, "epoch": 2}
    assert run_ranks(world, _unequal, tmp_path, ep, stream, init_process_group=False) == [expected] * world


def _unequal_windows(root: Path) -> list[Any]:
    """Accumulation, float limits and several loaders, with loaders of unequal length."""
    rank = _rank()
    found: list[Any] = []
    flags = {"use_distributed_sampler": False, "num_sanity_val_steps": 0}
    for kind in (Samples, Stream):
        trainer = _trainer(root, 2, max_epochs=1, accumulate_grad_batches=2, **flags)
        trainer.fit(TinyModule(), DataLoader(kind(5 + rank), batch_size=1))
        found.append(trainer.global_step)
    steps = Steps()
    trainer = _trainer(root, 2, max_epochs=1, limit_train_batches=0.5, callbacks=[steps], **flags)
    trainer.fit(TinyModule(), DataLoader(Samples(8 + 2 * rank), batch_size=1))
    found.append(steps.counts["train"])
    steps = Steps()
    trainer = _trainer(root, 2, callbacks=[steps], **flags)
    loaders = [DataLoader(Samples(2 + rank), batch_size=1), DataLoader(Stream(3 + 2 * rank), batch_size=1)]
    trainer.validate(TinyModule(), loaders, verbose=False)
    found.append(steps.counts["val"])
    return found


def test_unequal_loaders_with_accumulation_limits_and_several_loaders(tmp_path: Path) -> None:
    # 5 batches in windows of 2; half of 8 batches; 2 batches of the first loader and 3 of the second
    assert run_ranks(2, _unequal_windows, tmp_path, init_process_group=False) == [[3, 3, 4, 5]] * 2


def _combined(root: Path) -> list[int]:
    class Two(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["one"], batch_idx) + self.loss(batch["two"])

    module = Two()
    rank = _rank()
    loaders = {
        "one": DataLoader(Samples(2 + rank), batch_size=1),
        "two": DataLoader(Samples(5 - rank, first=50), batch_size=1),
    }
    trainer = _trainer(root, 2, max_epochs=1, use_distributed_sampler=False)
    trainer.fit(module, L.pytorch.utilities.CombinedLoader(loaders, "min_size"))
    return [trainer.global_step]


def test_combined_loaders_of_unequal_length(tmp_path: Path) -> None:
    assert run_ranks(2, _combined, tmp_path, init_process_group=False) == [[2], [2]]


# ---------------------------------------------------------------------------------------------------- the sampler


def _seen(root: Path, ep: int) -> dict[str, list[list[int]]]:
    epochs: list[list[int]] = []

    class Remember(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            epochs.append(list(module.seen))
            module.seen.clear()

    trainer = _trainer(root, ep, max_epochs=2, callbacks=[Remember()])
    assert trainer.strategy.data_world_size == 4
    trainer.fit(TinyModule(), DataLoader(Samples(16), batch_size=2, shuffle=True))
    assert trainer.strategy.data_rank == dist.get_rank()
    return {"epochs": epochs}


@pytest.mark.parametrize("ep", [4, 2])
def test_the_default_sampler_gives_disjoint_samples_by_data_rank(ep: int, tmp_path: Path) -> None:
    ranks = run_ranks(4, _seen, tmp_path, ep, init_process_group=False)
    for epoch in range(2):
        shares = [rank["epochs"][epoch] for rank in ranks]
        assert sorted(i for share in shares for i in share) == list(range(16))
        assert all(len(share) == 4 for share in shares)
    assert ranks[0]["epochs"][0] != ranks[0]["epochs"][1], "a new order in every epoch"


def _one_batch(root: Path) -> float:
    torch.manual_seed(0)
    trainer = _trainer(root, 2, max_epochs=1)
    module = TinyModule()
    trainer.fit(module, DataLoader(Samples(4), batch_size=2), DataLoader(Samples(5, first=100), batch_size=1))
    return trainer.callback_metrics["val_loss"].item()


def test_validation_with_the_default_sampler_has_equal_lengths(tmp_path: Path) -> None:
    one, two = run_ranks(2, _one_batch, tmp_path, init_process_group=False)
    assert one == two


def test_lockstep_leaves_equal_loaders_alone() -> None:
    equal = DataLoader(torch.arange(4))
    assert with_equal_steps(equal, lambda value: [value, value]) is equal
    with pytest.warns(UserWarning, match=r"\[4, 2\] batches; all ranks stop after 2"):
        assert len(with_equal_steps(equal, lambda value: [value, 2])) == 2
