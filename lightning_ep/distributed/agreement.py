"""What all ranks know of one another: values, and errors, so that all go on or all raise alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lightning_ep.process_groups import hosts

T = TypeVar("T")
P = TypeVar("P")


def from_all_ranks(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The objects of all ranks, by rank; of this process alone where there is no process group."""
    if not dist.is_initialized():
        return [value]
    gathered: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def to_first_rank(value: T) -> list[T] | None:
    """The objects of all ranks, by rank, on rank 0; None on the others. Every rank must call it."""
    if not dist.is_initialized():
        return [value]
    first = dist.get_rank() == 0
    gathered: list[T] | None = [value] * dist.get_world_size() if first else None
    dist.gather_object(value, gathered)
    return gathered


def of_any_rank(flags: Sequence[bool]) -> list[bool]:
    """Of each flag, whether it is set on any rank; over the hosts. Every rank must call it with as many."""
    found = torch.tensor(flags, dtype=torch.uint8)
    if len(found):
        dist.all_reduce(found, dist.ReduceOp.MAX, group=hosts())
    answers: list[bool] = found.bool().tolist()
    return answers


def agree(
    value: T, problem: P | None, error: Callable[[Mapping[int, P]], Exception], group: dist.ProcessGroup | None = None
) -> list[T]:
    """The one way in which ranks go on, or raise, together; every rank must call it.

    Args:
        value: What this rank has found; sent to all.
        problem: What keeps it from going on, None if nothing does; sent to all.
        error: Makes the exception of the problems of all ranks, by rank.
        group: The ranks. Default: all.

    Returns:
        The values of all ranks, by rank.

    Raises:
        Exception: What ``error`` gives, on every rank, if any has a problem.
    """
    gathered = from_all_ranks((problem, value), group)
    problems = {rank: found for rank, (found, _) in enumerate(gathered) if found is not None}
    if problems:
        raise error(problems)
    return [found for _, found in gathered]


class Ranks:
    """Ranks that do things together: a function is called on all, and all return or all raise.

    Args:
        error: The type of what is raised.
        timeout: How long a rank waits for the others, which may be writing: a group for one thread, over gloo, since
            collectives of two threads on one group would mix. None: the group of all, from the main thread.
    """

    def __init__(self, error: type[Exception], timeout: timedelta | None = None) -> None:
        self.error = error
        self.group = None if timeout is None else dist.new_group(backend="gloo", timeout=timeout)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1

    def together(self, what: str, function: Callable[[], T]) -> list[T]:
        """Calls ``function`` on every rank and returns the results of all, by rank.

        Raises:
            Exception: Of the type ``error``, on every rank, if the function raised on any; names those ranks and their
                errors.
        """
        result: Any = None
        cause: Exception | None = None
        try:
            result = function()
        except Exception as exception:
            cause = exception

        def error(texts: Mapping[int, str]) -> Exception:
            exception = self.error(f"{what}: {join(texts, self.size)}")
            exception.__cause__ = cause
            return exception

        return agree(result, self._text(cause), error, self.group)

    def alone(self, what: str, function: Callable[[], T]) -> T:
        """Calls ``function`` on every rank, returns the rank's own result, sends only errors; raises as `together`."""
        result: list[T] = []
        self.together(what, lambda: result.append(function()))
        return result[0]

    def on_first(self, what: str, function: Callable[[], T]) -> T:
        """Calls ``function`` on rank 0 and returns its result on every rank; raises as `together`."""
        return self.together(what, lambda: function() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def in_turns(self, what: str, first: bool, function: Callable[[], T]) -> T:
        """Calls ``function`` on the ranks that are ``first``, then on the others; raises as `together`."""
        result: list[T] = []
        for turn in (first, not first):
            self.together(what, lambda: result.append(function()) if turn else None)  # noqa: B023
        return result[0]

    def _text(self, error: Exception | None) -> str | None:
        if error is None or isinstance(error, self.error):
            return None if error is None else str(error)
        return f"{type(error).__name__}: {error}"


def join(errors: Mapping[int, str], num_ranks: int) -> str:
    """One text from the errors of several ranks; what all say is said once."""
    texts = list(dict.fromkeys(errors.values()))
    if len(texts) == 1 and (len(errors) == num_ranks or num_ranks == 1):
        return texts[0]
    return "; ".join(f"rank {rank}: {text}" for rank, text in errors.items())
