"""Plain DataLoaders that go on where a checkpoint left them: by their indices, so that nothing is loaded in vain."""

from __future__ import annotations

import copy
import warnings
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any
from zlib import crc32

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from lightning_ep.checkpoint.loop_state import batch_counts, batches_done, shift_batches

Position = dict[str, Any]
"""Of one loader: ``batches`` of its pass that were trained with, their ``checksum``, ``batch_size``, and the states of
its generators as the pass began (``generators``) and when this was noted (``behind``)."""


class Order:
    """The indices of a DataLoader's batches: notes what a pass hands out, and can begin one at a later batch.

    The order of most samplers is a function of an epoch (`set_epoch`) and of random generators, whose state at the
    beginning of the pass is noted. Whether that was all is seen in the checksum of the indices that are passed over.

    Args:
        indices: What the DataLoader has for a batch sampler, or without batches for a sampler.
        generators: Random generators that it draws from.
    """

    def __init__(self, indices: Iterable[Any], generators: Sequence[torch.Generator]) -> None:
        self._indices = indices
        self._generators = generators
        self._states: list[torch.Tensor] = []
        self._checksums = array("L")  # of the pass: of its indices up to each batch
        self._start: Position | None = None

    def __len__(self) -> int:
        return len(self._indices)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing is drawn before the first batch is asked for, as from torch's samplers.
        skipped = self.skips
        start, self._start = self._start, None
        put_back = torch.get_rng_state() if start is not None else None
        if start is not None:
            for generator, state in zip(self._generators, start["generators"], strict=False):
                generator.set_state(state)
        self._states = [generator.get_state() for generator in self._generators]
        self._checksums = checksums = array("L")
        rest = iter(self._indices)
        first = next(rest, None)  # samplers without a generator draw a seed from the default one here
        if put_back is not None:
            torch.set_rng_state(put_back)
        checksum = 0
        for number, batch in enumerate(chain([first], rest) if first is not None else ()):
            checksum = crc32(repr(batch).encode(), checksum)
            checksums.append(checksum)
            if number >= skipped:
                yield batch
            elif number == skipped - 1 and start["checksum"] not in (None, checksum):  # type: ignore[index]
                rank_zero_warn(
                    f"The train dataloader ({start['name']}) hands out other samples than in the run that saved "  # type: ignore[index]
                    f"the checkpoint, so that of those left in this epoch some have been seen and others never come. "
                    "Its dataset or the seed of its sampler differ, or the sampler draws from a generator of its own "
                    "that is no torch.Generator: seed that by `set_epoch`."
                )

    def position(self, batches: int) -> Position:
        """The position after so many batches of the pass that is under way."""
        known = 0 < batches <= len(self._checksums)
        return {
            "batches": batches,
            "checksum": self._checksums[batches - 1] if known else None,
            "generators": list(self._states),
            # Not to be found from the others: a sampler may draw once more where a loader asks for one batch too many.
            "behind": [generator.get_state() for generator in self._generators],
        }

    @property
    def skips(self) -> int:
        """Batches that the next pass leaves out at its beginning."""
        return self._start["batches"] if self._start is not None else 0

    def go_on(self, position: Position) -> None:
        """Lets the next pass begin at a position; its ``name`` is for messages."""
        self._start = position

    def pass_over(self, position: Position) -> None:
        """Lets the next pass be the one behind a pass that has ended at a position, and begin with its first batch."""
        self._start = None
        if torch.default_generator in self._generators:  # its state is kept for the whole run
            return
        for generator, state in zip(self._generators, position.get("behind", ()), strict=False):
            generator.set_state(state)


class _Ordered(DataLoader[Any]):
    """A DataLoader of any class whose indices come from an `Order`."""

    order: Order

    @property
    def _index_sampler(self) -> Any:
        return self.order


def _ordered(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A copy of a loader that notes its order; of the same class, with the same samplers and dataset."""
    twin = copy.copy(loader)
    # A CombinedLoader of the user's holds what an earlier run has made of its loaders.
    indices = loader.order._indices if isinstance(loader, _Ordered) else loader._index_sampler
    twin.__dict__.update(_iterator=None, order=Order(indices, _generators(loader)))
    if not isinstance(loader, _Ordered):
        twin.__class__ = type(type(loader).__name__, (_Ordered, type(loader)), {})
    return twin


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """The generators that an order is drawn from: those of loader and samplers, or the default one."""
    found: dict[int, torch.Generator] = {}
    seen = {id(loader.dataset)}

    def look(value: Any) -> None:
        if isinstance(value, torch.Generator):
            found[id(value)] = value
        elif id(value) not in seen and hasattr(value, "__dict__") and hasattr(value, "__len__"):
            seen.add(id(value))
            for attribute in vars(value).values():
                look(attribute)

    for value in (loader.generator, loader.batch_sampler, loader.sampler):
        look(value)
    return list(found.values()) or [torch.default_generator]


def positions(trainer: Trainer) -> list[Position | None]:
    """Where the training's loaders stand on this rank; None for those that are no DataLoaders over indices."""
    combined = trainer.fit_loop._combined_loader
    if combined is None:
        return []
    done = batch_counts(trainer).processed
    found: list[Position | None] = []
    for loader in combined.flattened:
        order = getattr(loader, "order", None)
        if not isinstance(order, Order):
            found.append(None)
            continue
        batches = done
        # The loader's, which may end before its order does, with that of another rank.
        if (length := _length(loader)) and done > length:  # beside a longer one
            batches = length if combined._mode == "max_size" else (done - 1) % length + 1
        found.append({**order.position(batches), "batch_size": loader.batch_size})
    return found


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


class PlainLoaders:
    """Makes the plain DataLoaders of a training know their order, and go on in it after a resume.

    Args:
        saved: `positions` of the rank whose batches this one gets; None if this run does not resume, or the checkpoint
            does not say.
        first: The same of rank 0.
        data_ranks: Ranks with batches of their own in the run that saved.
        here: The same of this run.
    """

    def __init__(
        self,
        saved: list[Position | None] | None = None,
        first: list[Position | None] | None = None,
        data_ranks: int = 1,
        here: int = 1,
    ) -> None:
        self._saved = saved
        self._first = first
        self._data_ranks = data_ranks
        self._here = here
        self._count = 0
        self._began: list[tuple[Order, Position]] = []

    def adopt(self, trainer: Trainer, loader: Any) -> Any:
        """The loader that the training gets; to be called for each of them, in order, on every rank.

        Args:
            trainer: The trainer, whose loops know where the epoch goes on.
            loader: What Lightning has prepared of the user's. What is no DataLoader, or keeps its position itself, is
                returned as it is.
        """
        number, self._count = self._count, self._count + 1
        if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
            return loader
        done = batches_done(trainer)
        if done:
            # Lightning would say of all loaders without a state that they are not resumable.
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            if done:
                _warn_of_new_start(_name(loader), "it has no state_dict and load_state_dict to keep its position", done)
            return loader
        if type(loader).__iter__ is not DataLoader.__iter__:
            # One batch need not be one of the order's, and the iterator may be older than this run.
            if done:
                _warn_of_new_start(_name(loader), "its class has an __iter__ of its own, and no state_dict", done)
            return loader
        loader = _ordered(loader)
        # Workers ask for indices as soon as there is an iterator, which Lightning makes before it sets the epoch.
        epochs: Any = trainer.fit_loop.epoch_progress.current
        _set_sampler_epoch(loader, epochs.processed)
        saved = self._saved[number] if self._saved is not None and number < len(self._saved) else None
        anew = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if done:
            self._go_on(trainer, loader, saved, done)
        elif saved is not None and saved["batches"] and not anew:
            loader.order.pass_over(saved)  # of the epoch before
        return loader

    def end_epoch(self) -> None:
        """Once the loop has its iterators: no batch was left of the epoch that the run goes on with."""
        for order, position in self._began:
            order.pass_over(position)

    def _go_on(self, trainer: Trainer, loader: Any, saved: Position | None, done: int) -> None:
        name = _name(loader)
        if saved is None:
            if not isinstance(loader.sampler, SequentialSampler | DistributedSampler):
                _warn_of_new_start(name, "the checkpoint does not say in which order its samples came", done)
                return
            saved = {"batches": done, "checksum": None, "generators": []}
        elif (self._data_ranks, saved["batch_size"]) != (self._here, loader.batch_size):
            if (batches := self._batches_here(loader)) is None:
                _warn_of_new_start(
                    name,
                    f"it was cut for {self._data_ranks} data ranks with batch_size={saved['batch_size']}, is cut for "
                    f"{self._here} with batch_size={loader.batch_size} here, and only the shuffling of torch's "
                    "DistributedSampler of a single loader, with the seed of the run that saved, is the same for both",
                    done,
                )
                return
            saved = {"batches": batches, "checksum": None, "generators": []}
            shift_batches(trainer, batches - done)
        loader.order.go_on({**saved, "name": name})
        self._began.append((loader.order, saved))

    def _batches_here(self, loader: Any) -> int | None:
        """As how many batches of this run those count that were done; None if the order of all ranks is not known.

        The same on every rank, since it is found from what rank 0 has saved.
        """
        sampler, dataset, saved = loader.sampler, loader.dataset, self._first[0] if self._first else None
        if type(sampler) is not DistributedSampler or type(loader.batch_sampler) is not BatchSampler:
            return None
        if saved is None or len(self._first or ()) > 1:
            return None
        first: DistributedSampler[Any] = DistributedSampler(
            dataset, self._data_ranks, 0, sampler.shuffle, seed=sampler.seed, drop_last=sampler.drop_last
        )
        first.set_epoch(sampler.epoch)
        checksum = 0
        for _, batch in zip(range(saved["batches"]), BatchSampler(first, saved["batch_size"], False), strict=False):
            checksum = crc32(repr(batch).encode(), checksum)
        if saved["checksum"] != checksum:
            return None
        samples, step = saved["batches"] * saved["batch_size"] * self._data_ranks, loader.batch_size * self._here
        if samples % step:
            rank_zero_warn(
                f"The checkpoint stops after {samples} samples of its epoch, which is no multiple of this run's "
                f"batch_size={loader.batch_size} x {self._here} data ranks = {step}: the last {samples % step} of them "
                "come again."
            )
        return samples // step


def _name(loader: Any) -> str:
    if not isinstance(loader, DataLoader):
        return type(loader).__name__
    sampler = "" if isinstance(loader.dataset, IterableDataset) else f", {type(loader.sampler).__name__}"
    return f"{type(loader).__name__} of {type(loader.dataset).__name__}{sampler}"


def _warn_of_new_start(name: str, reason: str, done: int) -> None:
    rank_zero_warn(
        f"The checkpoint stops in mid-epoch, after {done} batches, and the train dataloader ({name}) starts at its "
        f"first sample again: {reason}. Samples that were seen come again, and as many others do not come in this "
        "epoch. Resume from the end of an epoch, or use a loader that can resume, as lightning_ep.data.ResumableLoader."
    )
