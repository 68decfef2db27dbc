"""Plain loaders of a training that is resumed in mid-epoch, in two ranks: they go on, or are named in a warning."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, WeightedRandomSampler

from lightning_ep import ExpertParallelStrategy
from tests.rows import RowFailures, Rows, whole
from tests.tiny import Samples, TinyModule, quiet

row = Rows()


class _Epochs(TinyModule):
    """Notes which samples came in which epoch, and drops out."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__(attention_dropout=0.2)
        self.make = make
        self.came: list[tuple[int, list[int]]] = []

    def train_dataloader(self) -> Any:
        return self.make()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batches = batch if isinstance(batch, list) else [batch]
        self.came.append((self.trainer.current_epoch, [i for b in batches if b is not None for i in b["id"].tolist()]))
        return sum(super(_Epochs, self).training_step(b, batch_idx) for b in batches if b is not None)


class _OfPairs(Sampler):
    """A batch sampler of one's own, which Lightning cannot put its sampler into."""

    def __init__(self, size: int) -> None:
        self.order = list(range(size))

    def __len__(self) -> int:
        return len(self.order) // 2

    def __iter__(self) -> Any:
        return iter(zip(self.order[::2], self.order[1::2], strict=True))


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _of_ones_own(**options: Any) -> DataLoader:
    """Seven batches of this rank's own samples; nothing injects a sampler."""
    return DataLoader(Samples(14, first=100 * int(os.environ["RANK"])), **{"batch_size": 2, **options})


# Workers are forked: ranks of the tests would start each with all its imports.
_INJECTED: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Samples(27), batch_size=2, shuffle=True),
    "workers": lambda: DataLoader(Samples(29), batch_size=2, drop_last=True, num_workers=2),
    "workers that stay": lambda: DataLoader(Samples(28), batch_size=2, num_workers=1, persistent_workers=True),
}
_OWN: dict[str, Callable[[], Any]] = {
    "own generator, workers": lambda: _of_ones_own(shuffle=True, generator=_seeded(), num_workers=1),
    "weighted": lambda: _of_ones_own(sampler=WeightedRandomSampler([1.0] * 14, 14, generator=_seeded())),
    "no generator": lambda: _of_ones_own(shuffle=True),
    "own batch sampler": lambda: _of_ones_own(batch_size=1, batch_sampler=_OfPairs(14)),
    "without batches": lambda: DataLoader(
        list(_of_ones_own()), batch_size=None, sampler=RandomSampler(range(7), generator=_seeded())
    ),
    "two, the shorter again and again": lambda: CombinedLoader(
        [_of_ones_own(), DataLoader(Samples(6, first=50), 2, shuffle=True, generator=_seeded())], "max_size_cycle"
    ),
    "two, the shorter once": lambda: CombinedLoader([_of_ones_own(), DataLoader(Samples(6, first=50), 2)], "max_size"),
}


class _SavesAt(L.Callback):
    def __init__(self, root: Path, steps: tuple[int, ...], batches: tuple[int, ...] = ()) -> None:
        self.root, self.steps, self.batches, self.done = root, list(steps), batches, 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.done += 1
        if self.done in self.batches:
            trainer.save_checkpoint(self.root / f"{self.done}.ckpt")
        elif trainer.global_step in self.steps:
            self.steps.remove(trainer.global_step)
            trainer.save_checkpoint(self.root / f"{trainer.global_step}.ckpt")


def _goes_on(
    root: Path,
    make: Callable[[], Any],
    own: bool,
    epochs: int = 2,
    points: tuple[int, ...] = (9,),
    batches: tuple[int, ...] = (),
    callbacks: tuple[L.Callback, ...] = (),
    **flags: Any,
) -> None:
    """Resumes after these steps, or batches, of a run whose epochs have 7 batches."""
    flags = {"max_epochs": epochs, "use_distributed_sampler": not own, "num_sanity_val_steps": 0, **flags}
    saves = _SavesAt(root, () if batches else points, batches)
    quiet(root, callbacks=[saves, *callbacks], **flags).fit(straight := _Epochs(make))
    expected = {name: whole(param) for name, param in straight.named_parameters()}
    for step in batches or points:
        resumed = _Epochs(make)
        quiet(root, callbacks=[*callbacks], **flags).fit(resumed, ckpt_path=root / f"{step}.ckpt")
        accumulated = flags.get("accumulate_grad_batches", 1)
        left = len(straight.came) - step * accumulated
        assert resumed.came == straight.came[-left:], step
        assert resumed.losses[-left:] == straight.losses[-left:], step
        for name, param in resumed.named_parameters():
            assert torch.equal(whole(param), expected[name]), (step, name)


@contextmanager
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in ("You're resuming from a checkpoint that ended", ".*train dataloader"):
            warnings.filterwarnings("error", message=message)
        yield


@contextmanager
def _warning(message: str) -> Iterator[None]:
    """Rank 0 warns of a loader, and no rank says what Lightning would say of all."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in found]
    if int(os.environ["RANK"]) == 0:
        assert any(re.search(message, text) for text in texts), (message, texts)
    assert not any("your dataloader is not resumable" in text for text in texts), texts


@row()
def a_loader_with_lightnings_sampler_goes_on(root: Path) -> None:
    with _no_warning():
        _goes_on(root, _INJECTED["shuffled"], own=False, epochs=2, points=(2, 7, 8))


@row()
def a_loader_of_ones_own_goes_on(root: Path) -> None:
    with _no_warning():
        for name in ("own generator, workers", "two, the shorter again and again"):
            _goes_on(root / name, _OWN[name], own=True)


@row()
def generators_of_ones_own_go_on_with_the_next_epoch(root: Path) -> None:
    for name in ("own generator, workers", "two, the shorter again and again"):
        _goes_on(root / name, _OWN[name], own=True, points=(7,))


class _SavesBehindValidation(L.Callback):
    def __init__(self, root: Path) -> None:
        self.root = root

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        trainer.save_checkpoint(self.root / f"{trainer.global_step}.ckpt")


@row()
def a_loader_goes_on_behind_the_last_validation_of_an_epoch(root: Path) -> None:
    """Where ModelCheckpoint saves with ``val_check_interval``: no batch is left of an epoch that is not over."""
    loaders = {"injected": _INJECTED["shuffled"], "own": lambda: _of_ones_own(shuffle=True), "unequal": _unequal}
    for name, make in loaders.items():
        flags = {"max_epochs": 2, "num_sanity_val_steps": 0, "use_distributed_sampler": name == "injected"}
        flags["limit_train_batches"] = 5

        def fit(callbacks: list[L.Callback], path: Path | None, make: Any = make, flags: Any = flags) -> _Epochs:
            trainer, module = quiet(root, callbacks=callbacks, **flags), _Epochs(make)
            trainer.fit(module, val_dataloaders=DataLoader(Samples(4, first=200), 2), ckpt_path=path)
            return module

        straight = fit([_SavesBehindValidation(root / name)], None)
        resumed = fit([], root / name / "5.ckpt")
        assert len(straight.came) == 10, name
        assert resumed.came == straight.came[5:], name
        assert resumed.losses == straight.losses[-len(resumed.losses) :], name


@row(slow=True)
def every_loader_goes_on(root: Path) -> None:
    with _no_warning():
        for name in ("workers", "workers that stay"):
            _goes_on(root / name, _INJECTED[name], own=False)
        for name, make in _OWN.items():
            _goes_on(root / name, make, own=True)


@row()
def a_loader_goes_on_between_two_windows_of_accumulation(root: Path) -> None:
    _goes_on(root, _INJECTED["shuffled"], own=False, points=(4,), accumulate_grad_batches=2, limit_train_batches=6)


@row()
def a_loader_goes_on_with_the_accumulation_of_its_epoch(root: Path) -> None:
    flags = {"callbacks": (GradientAccumulationScheduler({0: 1, 1: 2}),), "limit_train_batches": 6}
    _goes_on(root, _INJECTED["shuffled"], own=False, batches=(8,), **flags)


@row()
def gradients_that_are_lost_are_named(root: Path) -> None:
    """Three batches, of which one is in a window that has not ended."""
    straight = _Epochs(_INJECTED["shuffled"])
    flags = {"accumulate_grad_batches": 2, "max_epochs": 1}
    quiet(root, callbacks=[_SavesAt(root, (), batches=(3,))], **flags).fit(straight)
    with _warning(r"after batch 3 of its epoch, inside a window of accumulate_grad_batches=2: .* 1 batches are lost"):
        quiet(root, **flags).fit(resumed := _Epochs(_INJECTED["shuffled"]), ckpt_path=root / "3.ckpt")
    assert resumed.came == straight.came[3:]


def _unequal() -> CombinedLoader:
    """The shorter one has 3 batches on rank 0 and 4 on rank 1, which leaves its last one out."""
    shorter = DataLoader(Samples(6 + 2 * int(os.environ["RANK"]), first=50), 2)
    return CombinedLoader([_of_ones_own(), shorter], "max_size_cycle")


@row()
def a_shorter_loader_of_unequal_ranks_goes_on(root: Path) -> None:
    _goes_on(root, _unequal, own=True, points=(2, 5, 11))


@row()
def the_same_combined_loader_in_a_second_fit(root: Path) -> None:
    """Which holds what the first one has made of its loaders."""
    combined = CombinedLoader([_of_ones_own()], "min_size")
    _goes_on(root, lambda: combined, own=True)


# ---------------------------------------------------------------------------------------------------- other cuts


def _straight(root: Path, make: Callable[[], Any], point: int, **flags: Any) -> _Epochs:
    flags = {"max_epochs": 2, "num_sanity_val_steps": 0, **flags}
    quiet(root, callbacks=[_SavesAt(root, (point,))], **flags).fit(straight := _Epochs(make))
    return straight


def _global_batches(module: _Epochs) -> list[tuple[int, list[int]]]:
    """The samples of all data ranks, step by step."""
    shares: list[Any] = [None, None]
    dist.all_gather_object(shares, module.came)
    return [(one[0], sorted({*one[1], *other[1]})) for one, other in zip(*shares, strict=True)]


def _of(batch_size: int, **options: Any) -> Callable[[], DataLoader]:
    return lambda: DataLoader(Samples(24), batch_size=batch_size, shuffle=True, **options)


@row()
def the_same_global_batches_on_another_number_of_data_ranks(root: Path) -> None:
    straight = _straight(root, _of(2), 8)  # two steps into the second epoch
    strategy = ExpertParallelStrategy(ep=2, tp=2)
    quiet(root, strategy=strategy, max_epochs=3).fit(resumed := _Epochs(_of(4)), ckpt_path=root / "8.ckpt")
    assert _global_batches(resumed)[:4] == _global_batches(straight)[8:]
    assert len(resumed.came) == 4 + 6


@row()
def another_batch_size(root: Path) -> None:
    straight = _straight(root, _of(2), 8)
    done = {i for epoch, ids in _global_batches(straight)[6:8] for i in ids}
    quiet(root, max_epochs=2).fit(resumed := _Epochs(_of(4)), ckpt_path=root / "8.ckpt")
    rest = [i for epoch, ids in _global_batches(resumed) for i in ids]
    assert sorted(rest) == sorted(set(range(24)) - done)
    with _warning("stops after 8 samples of its epoch, which is no multiple.* = 6: the last 2 of them come again"):
        quiet(root, max_epochs=2).fit(resumed := _Epochs(_of(3)), ckpt_path=root / "8.ckpt")
    rest = [i for epoch, ids in _global_batches(resumed) for i in ids]
    assert len(rest) == 18
    assert len(set(rest) & done) == 2


class _Numbers(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return (Samples(24)[i] for i in range(12))


class _Batches:
    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[Any]:
        return iter(_of_ones_own())


class _Halves(DataLoader):
    """Gives each batch in two."""

    def __len__(self) -> int:
        return 2 * super().__len__()

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield from ({name: value[half : half + 1] for name, value in batch.items()} for half in range(2))


class _OwnOrder(Sampler):
    """Draws from a generator that is no torch.Generator."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return 14

    def __iter__(self) -> Iterator[int]:
        return iter(self.random.permutation(14).tolist())


@row()
def what_cannot_go_on_is_named(root: Path) -> None:
    own = {"use_distributed_sampler": False}
    first_again = "starts at its first sample again"
    cases: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any], str]] = {
        "stream": ((make := lambda: DataLoader(_Numbers(), 2)), make, {}, rf"DataLoader of _Numbers\) {first_again}"),
        "iterable": ((make := _Batches), make, {}, rf"_Batches\) {first_again}: it has no state_dict"),
        "halves": (
            (make := lambda: _Halves(Samples(8), 2)),
            make,
            own,
            rf"_Halves of Samples.* {first_again}: its class has an __iter__ of its own",
        ),
        "sampler": (
            (make := lambda: _of_ones_own(sampler=_OwnOrder())),
            make,
            own,
            r"_OwnOrder\) hands out other samples.*no torch.Generator",
        ),
        "dataset": (
            _of(2),
            lambda: DataLoader(Samples(26), 2, shuffle=True),
            {},
            r"DataLoader of Samples, DistributedSampler\) hands out other samples",
        ),
        "cut": (
            _of_ones_own,
            lambda: _of_ones_own(batch_size=1),
            own,
            rf"SequentialSampler\) {first_again}.*batch_size=2",
        ),
    }
    for name, (saves, resumes, flags, message) in cases.items():
        point = 9 if name in ("sampler", "dataset") else 2
        _straight(root / name, saves, point, max_steps=point, **flags)
        with _warning(message):
            quiet(root, max_steps=point + 1, **flags).fit(_Epochs(resumes), ckpt_path=root / name / f"{point}.ckpt")


@row()
def a_checkpoint_that_says_nothing_of_loaders(root: Path) -> None:
    """As those of earlier versions, and of other strategies: the seeded orders of torch's samplers are trusted."""

    def without(trainer: L.Trainer) -> None:
        path = root / "8.ckpt"
        if trainer.is_global_zero:
            content = torch.load(path, weights_only=True)
            for entry in content["ranks"]:
                del entry["loaders"]
            torch.save(content, path)
        dist.barrier()

    def one_file() -> ExpertParallelStrategy:
        return ExpertParallelStrategy(ep=2, save_distributed_checkpoint=False)

    straight = _straight(root, _of(2), 8, strategy=one_file())
    without(straight.trainer)
    with _no_warning():
        quiet(root, max_epochs=2).fit(resumed := _Epochs(_of(2)), ckpt_path=root / "8.ckpt")
    assert resumed.came == straight.came[8:]
    flags = {"use_distributed_sampler": False}
    straight = _straight(root, _of(4), 8, strategy=one_file(), **flags)
    without(straight.trainer)
    with _warning(r"RandomSampler\) starts at its first sample again: the checkpoint does not say"):
        quiet(root, max_epochs=2, **flags).fit(_Epochs(_of(4)), ckpt_path=root / "8.ckpt")


@pytest.mark.parametrize("name", row)
def test_goes_on_or_is_named(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
