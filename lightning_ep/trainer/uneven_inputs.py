"""Loaders whose ranks take the same number of steps: a rank that stops alone leaves the others in a collective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_ep.checkpoint.loader_position import Order

Gather = Callable[[int], list[int]]
Join = Callable[[object, Any, int], None]


class EqualStepsLoader:
    """Wraps a dataloader so that every rank leaves it after the same step.

    Two ways, both without losing or repeating a sample in what the loop sees:

    - *stop*: all ranks stop with the first one whose data ends (training, validation, test);
    - *join*: a rank whose data has ended takes the remaining steps with a batch it has seen already, outside of the
      loop, so that nothing of them is recorded (predict).

    Args:
        loader: The rank's own loader; its attributes show through.
        gather: Collects one integer per rank, in rank order.
        lengths: Batches of every rank's loader, if all are known.
        limit: The loop leaves the loader after this many batches.
        join: Runs a step, given this loader, a batch and its number, and discards the result; None for *stop*.
    """

    def __init__(
        self,
        loader: Any,
        gather: Gather,
        lengths: list[int] | None,
        limit: float = float("inf"),
        join: Join | None = None,
    ) -> None:
        self._loader = loader
        self._gather = gather
        self._join = join
        self._limit = limit
        self._num_steps: int | None = None
        if lengths is not None:
            self._num_steps = max(lengths) if join is not None else min(lengths)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # not yet set while unpickling
            raise AttributeError(name)
        return getattr(self._loader, name)

    # Spelled out: from Python 3.12 on, Lightning's protocol check for resumable loaders does not ask __getattr__.
    def state_dict(self) -> dict[str, Any]:
        """The wrapped loader's position, empty if it keeps none."""
        return self._loader.state_dict() if hasattr(self._loader, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts the wrapped loader where it was."""
        if hasattr(self._loader, "load_state_dict"):
            self._loader.load_state_dict(state)

    def __len__(self) -> int:
        if self._num_steps is None:
            raise TypeError("the number of batches is not known on every rank")
        return self._num_steps  # without the limit, of which Lightning takes its share from this

    def __iter__(self) -> Iterator[Any]:
        return self._iterate_counted() if self._num_steps is not None else self._iterate_agreeing()

    def _iterate_counted(self) -> Iterator[Any]:
        assert self._num_steps is not None
        num_steps = int(min(self._num_steps, self._limit))
        order = getattr(self._loader, "order", None)
        taken = order.skips if isinstance(order, Order) else 0
        batches = iter(self._loader)
        last = None
        if taken and taken >= num_steps:
            next(batches, None)  # a pass that is over has begun, so that the next one leaves nothing out
        while taken < num_steps and (batch := next(batches, None)) is not None:
            last = batch
            taken += 1
            yield batch
        if self._join is not None and taken < num_steps:
            last = self._any_batch() if last is None else last
            for step in range(taken, num_steps):
                self._join(self, last, step)

    def _iterate_agreeing(self) -> Iterator[Any]:
        batches = iter(self._loader)
        taken, last = 0, None
        while taken < self._limit:
            taken += 1
            batch = next(batches, None)
            going = self._gather(int(batch is not None))
            if not any(going):
                return
            if batch is not None:
                last = batch
            if all(going):
                yield batch
            elif self._join is None:
                ended = [rank for rank, has in enumerate(going) if not has]
                when = " without a batch," if taken == 1 else ""
                rank_zero_warn(
                    f"The dataloaders of ranks {ended} ended{when} before those of the others; all ranks stop here. "
                    "Give every rank the same number of batches to use all data."
                )
                return
            elif batch is not None:
                yield batch
            else:
                self._join(self, self._any_batch() if last is None else last, taken - 1)

    def _any_batch(self) -> Any:
        """A batch for a rank that has none of its own."""
        try:
            sample = self._loader.dataset[0]
            return self._loader.collate_fn(sample if self._loader.batch_sampler is None else [sample])
        except (AttributeError, TypeError, IndexError, KeyError, NotImplementedError) as error:
            raise RuntimeError(
                "this rank has no batch, while others have some to predict, and none can be made from its dataset. "
                "Give every rank at least one batch, or use fewer devices."
            ) from error


def with_equal_steps(
    loader: Any,
    gather: Gather,
    limit: int | float | None = None,
    join: Join | None = None,
) -> Any:
    """Returns ``loader`` itself where all ranks have equally many batches, else an `EqualStepsLoader`.

    Args:
        loader: The rank's loader, sized or not.
        gather: Collects one integer per rank, in rank order; every rank must call this function.
        limit: Lightning's ``limit_*_batches``: a number of batches (int) or a share of them (float).
        join: As in `EqualStepsLoader`.
    """
    try:
        length = len(loader)
    except (TypeError, NotImplementedError):
        length = -1
    lengths = gather(length)
    if min(lengths) < 0:
        # Lightning takes no share of a length that it does not know.
        return EqualStepsLoader(loader, gather, None, limit if isinstance(limit, int) else float("inf"), join)
    if len(set(lengths)) == 1:
        return loader
    steps = max(lengths) if join is not None else min(lengths)
    if join is None:
        rank_zero_warn(
            f"The ranks' dataloaders have {lengths} batches; all ranks stop after {steps}. Give every rank the same "
            "number of batches to use all data."
        )
    bound = float("inf") if limit is None else limit if isinstance(limit, int) else int(steps * limit)
    return EqualStepsLoader(loader, gather, lengths, bound, join)


def share_samples(loader: Any, num_ranks: int, rank: int) -> None:
    """Gives a rank its share, possibly empty, of the samples that Lightning's sampler for predict enumerates.

    Args:
        loader: What Lightning prepared for predict; changed in place if it holds that sampler, for a single rank.
        num_ranks: Ranks that share the samples.
        rank: This rank's index among them.

    Raises:
        TypeError: If Lightning put the sampler into a batch sampler of the user's that hides it: every rank would
            predict every sample.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    kept = [loader.sampler, *getattr(loader.batch_sampler, "__dict__", {}).values()]
    samplers = [value for value in kept if isinstance(value, DistributedSampler)]
    if not samplers:
        batch_sampler = getattr(loader.batch_sampler, "_batch_sampler", loader.batch_sampler)
        raise TypeError(
            f"Lightning shares the samples of predict among {num_ranks} ranks through a sampler that it passes to "
            f"{type(batch_sampler).__name__}, which does not keep it. Keep it as `self.sampler` there, or set "
            "Trainer(use_distributed_sampler=False) and give every rank its own samples."
        )
    for sampler in samplers:
        if isinstance(sampler, UnrepeatedDistributedSampler) and sampler.num_replicas == 1:
            sampler.num_replicas, sampler.rank = num_ranks, rank
            sampler.num_samples = len(range(rank, sampler.total_size, num_ranks))
