"""A data loader that knows which samples of the epoch it has handed out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader


def data_ranks(trainer: Trainer | None) -> tuple[int, int]:
    """Return ``(data_rank, data_world_size)``: which share of the data this process reads, of how many.

    Tensor- and context-parallel peers read the same share, so a strategy may say that there are fewer data ranks than
    processes, with the attributes ``data_rank`` and ``data_world_size``. Without a trainer there is one.
    """
    if trainer is None:
        return 0, 1
    strategy = trainer.strategy
    if hasattr(strategy, "data_world_size"):
        return strategy.data_rank, strategy.data_world_size  # type: ignore[attr-defined]
    return trainer.global_rank, trainer.world_size


class RankBatches:
    """Which samples make up the batches of one data rank in an epoch.

    A global batch is ``batch_size * data_world_size`` consecutive samples of the epoch's order, and data rank ``r``
    takes its ``r``-th slice. Every rank gets the same number of batches.

    Args:
        num_samples: Samples in the dataset.
        batch_size: Samples per batch and data rank.
        data_rank: This process's index among the data ranks.
        data_world_size: Number of data ranks.
        shuffle: A new permutation, drawn from ``(seed, epoch)``, in every epoch; otherwise always 0, 1, 2, ...
        seed: Seed of the permutations; must be equal on all ranks.
        drop_last: Leave out the samples past the last full global batch. Otherwise every sample comes exactly once, in
            batches whose sizes differ by at most one. For ``batch_size=1`` that is impossible unless
            ``data_world_size`` divides the samples; the rest is left out then.

    Raises:
        ValueError: If there are too few samples to give every data rank a batch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        data_rank: int,
        data_world_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool,
    ) -> None:
        needed = batch_size * data_world_size if drop_last else data_world_size
        if num_samples < needed:
            raise ValueError(
                f"The dataset has {num_samples} samples, but {data_world_size} data ranks with batch_size={batch_size} "
                f"need at least {needed} for a batch each. Use more data, a smaller batch_size or fewer data ranks."
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.data_rank = data_rank
        self.data_world_size = data_world_size
        self.shuffle = shuffle
        self.seed = seed
        self.equal_sizes = drop_last or batch_size == 1
        self.epoch = 0

    @property
    def global_batch_size(self) -> int:
        """Samples that all data ranks together take per step."""
        return self.batch_size * self.data_world_size

    @property
    def sampler(self) -> RankBatches:
        """Itself: Lightning calls ``loader.batch_sampler.sampler.set_epoch`` at the start of every epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches per epoch and rank."""
        full, rest = divmod(self.num_samples, self.global_batch_size)
        return full if self.equal_sizes else full + bool(rest)

    def __iter__(self) -> Iterator[list[int]]:
        return self.after(0)

    def after(self, samples: int) -> Iterator[list[int]]:
        """Iterate over the sample indices of each batch that is left after so many samples of this epoch."""
        order = np.arange(self.num_samples)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples)
        batches = len(self) - self.batches_before(samples)
        if batches == 0:
            return
        # The larger pieces come first, so that cutting what is left gives the pieces that a whole epoch has there.
        pieces = np.array_split(order[samples : self._end], batches * self.data_world_size)
        for piece in pieces[self.data_rank :: self.data_world_size]:
            yield piece.tolist()

    def batches_before(self, samples: int) -> int:
        """Of the epoch's batches, those that come before a position."""
        left = max(self._end - samples, 0) / self.global_batch_size
        return len(self) - (math.floor(left) if self.equal_sizes else math.ceil(left))

    def next_position(self, samples: int) -> int:
        """The position behind the global batch at a position."""
        pieces = (len(self) - self.batches_before(samples)) * self.data_world_size
        per_piece, larger = divmod(self._end - samples, pieces)
        return samples + self.data_world_size * per_piece + min(self.data_world_size, larger)

    def check_left(self, samples: int) -> None:
        """Raises ValueError if what is left after a position does not give every data rank its batches."""
        left, batches = self._end - samples, len(self) - self.batches_before(samples)
        if left < batches * self.data_world_size:
            raise ValueError(
                f"The checkpoint leaves {left} samples of its epoch, fewer than this run's {self.data_world_size} data "
                "ranks. Resume on fewer, or from the end of an epoch."
            )

    @property
    def _end(self) -> int:
        """Samples per epoch that come at all."""
        return len(self) * self.global_batch_size if self.equal_sizes else self.num_samples


class ResumableLoader:
    """Batches of a map-style dataset for one data rank, resumable at any batch.

    The loader is not a ``torch.utils.data.DataLoader``, so Lightning neither injects a sampler into it nor rebuilds it.
    It is an iterable with ``len``, ``state_dict`` and ``load_state_dict``, all that Lightning asks of a resumable
    loader, and each pass runs a ``DataLoader`` over what is left of the epoch. It counts samples as it hands them out,
    so batches that workers have prefetched are not lost in a checkpoint. Its position is kept in samples of the whole
    job, so a checkpoint may be resumed on another number of data ranks. It draws nothing from the global random
    generators.

    Args:
        dataset: Map-style dataset.
        batch_size: Samples per batch and data rank.
        data_rank: This process's index among the data ranks, as `data_ranks` gives it.
        data_world_size: Number of data ranks.
        shuffle: Permute the samples anew in every epoch, from ``(seed, epoch)``.
        seed: Seed of the permutations; must be equal on all ranks.
        drop_last: Leave out the samples past the last full global batch, for training. Otherwise every sample comes
            once, and still every rank gets the same number of batches (see `RankBatches`).
        collate_fn: Makes a batch of a list of samples. Default: PyTorch's.
        num_workers: Worker processes.
        pin_memory: Return batches in page-locked memory.

    Raises:
        ValueError: If the dataset is too small to give every data rank a batch.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        data_rank: int = 0,
        data_world_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        # Lightning would look for a DataLoader behind an attribute `dataset` or `sampler`.
        self._dataset = dataset
        self.batch_sampler = RankBatches(len(dataset), batch_size, data_rank, data_world_size, shuffle, seed, drop_last)
        self.collate_fn = collate_fn
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._epoch = 0
        self._samples = 0  # of that epoch, which all data ranks were handed
        self._resuming = False

    def __len__(self) -> int:
        """Batches of a whole epoch, also after a resume: Lightning adds those done before."""
        return len(self.batch_sampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass. Lightning does it by itself."""
        self.batch_sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing below runs before the first batch is asked for. Lightning creates the iterator first and
        # calls `set_epoch` afterwards, so a loader that chose its order (or started its workers) at once would resume
        # in the wrong epoch.
        if not (self._resuming and self._epoch == self.batch_sampler.epoch):
            self._epoch, self._samples = self.batch_sampler.epoch, 0
        self._resuming = False
        batches = DataLoader(
            self._dataset,
            batch_sampler=self.batch_sampler.after(self._samples),
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            # its own, or every pass would draw a number from the global generator
            generator=torch.Generator().manual_seed(self.batch_sampler.seed),
        )
        for batch in batches:
            self._samples = self.batch_sampler.next_position(self._samples)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its samples all data ranks together were handed; the same on every rank."""
        return {
            "epoch": self._epoch,
            "samples": self._samples,
            "dataset_size": self.batch_sampler.num_samples,
            "seed": self.batch_sampler.seed,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next pass go on at the position of ``state_dict``.

        If ``set_epoch`` chooses another epoch before that pass, it starts at the epoch's first sample.

        Raises:
            ValueError: If the position is inside an epoch, and the dataset's size, the seed or the global batch size
                does not allow to find it again.
        """
        here = {"dataset_size": self.batch_sampler.num_samples, "seed": self.batch_sampler.seed}
        there = {key: state_dict[key] for key in here}
        samples, step = state_dict["samples"], self.batch_sampler.global_batch_size
        if 0 < samples < state_dict["dataset_size"] - (step - 1 if self.batch_sampler.equal_sizes else 0):
            if here != there:
                raise ValueError(
                    f"The checkpoint stops inside an epoch over data with {there}, and this run has {here}: the "
                    "samples that are left cannot be found. Resume with the same data and seed, or from an epoch's end."
                )
            if self.batch_sampler.equal_sizes and samples % step:
                raise ValueError(
                    f"The checkpoint stops after {samples} samples of an epoch, which is no multiple of this run's "
                    f"batch_size={self.batch_sampler.batch_size} x {self.batch_sampler.data_world_size} data ranks = "
                    f"{step}. Choose a batch_size whose product divides it, or resume from the end of an epoch."
                )
            self.batch_sampler.check_left(samples)
        self._epoch, self._samples, self._resuming = state_dict["epoch"], samples, True
        self.set_epoch(self._epoch)
