"""What all ranks know of one another: objects, and errors, so that all go on or all raise the same one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_ep.checkpoint.errors import CheckpointError

T = TypeVar("T")


def from_all_ranks(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The objects of all ranks, by rank; of this process alone where there is no process group."""
    if not dist.is_initialized():
        return [value]
    gathered: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


class Ranks:
    """A gloo group over all ranks, for one thread: collectives of two threads on one group would mix.

    Args:
        timeout: How long a rank waits for the others, which may be writing.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def together(self, what: str, function: Callable[[], T]) -> list[T]:
        """Calls ``function`` on every rank and returns the results of all, by rank.

        Raises:
            CheckpointError: On every rank, if the function raised on any; names those ranks and their errors.
        """
        result: Any = None
        cause: Exception | None = None
        try:
            result = function()
        except Exception as exception:
            cause = exception
        gathered = from_all_ranks((_describe(cause), result), self.group)
        errors = {rank: error for rank, (error, _) in enumerate(gathered) if error is not None}
        if errors:
            raise CheckpointError(f"{what}: {join(errors, self.size)}") from cause
        return [result for _, result in gathered]

    def alone(self, what: str, function: Callable[[], T]) -> T:
        """Calls ``function`` on every rank, returns the rank's own result, sends only errors; raises as `together`."""
        result: list[T] = []
        self.together(what, lambda: result.append(function()))
        return result[0]

    def on_first(self, what: str, function: Callable[[], T]) -> T:
        """Calls ``function`` on rank 0 and returns its result on every rank; raises as `together`."""
        return self.together(what, lambda: function() if self.rank == 0 else None)[0]  # type: ignore[return-value]


def _describe(error: Exception | None) -> str | None:
    if error is None or isinstance(error, CheckpointError):
        return None if error is None else str(error)
    return f"{type(error).__name__}: {error}"


def join(errors: dict[int, str], num_ranks: int) -> str:
    """One text from the errors of several ranks; what all say is said once."""
    texts = list(dict.fromkeys(errors.values()))
    if len(texts) == 1 and (len(errors) == num_ranks or num_ranks == 1):
        return texts[0]
    return "; ".join(f"rank {rank}: {text}" for rank, text in errors.items())
