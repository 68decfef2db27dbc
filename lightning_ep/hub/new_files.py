"""What a run writes at its end and must not be there before: refused while nothing has been spent on the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any


class WritesSomethingNew(ABC):
    """A callback that writes, when a stage ends, what must not be there before it.

    Attributes:
        writes_after: The stage, as Lightning calls its function: fit, validate, test or predict.
    """

    writes_after: str

    @abstractmethod
    def refuse_existing(self) -> None:
        """Raises FileExistsError if it is there already."""


def refuse_existing(callbacks: Iterable[Any], stage: str | None) -> None:
    """Raises FileExistsError, before data and model are made, for what could not be written at the end."""
    for callback in callbacks:
        if isinstance(callback, WritesSomethingNew) and callback.writes_after == stage:
            callback.refuse_existing()
