"""The interface behind which rows travel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from lightning_ep.dispatch.plan import DispatchPlan


class Pending:
    """A transfer that has been started; `wait` finishes it and returns its tensor."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish = finish

    def wait(self) -> Tensor:
        """Returns the received tensor; on CUDA the current stream waits, the host does not."""
        return self._finish()


Plan = TypeVar("Plan", bound=DispatchPlan)


class Dispatcher(ABC, Generic[Plan]):
    """Sends rows to the ranks of their experts and brings them back.

    A dispatcher keeps no tensor of a call on itself: all that a later call needs is in the plan. `combine`
    is the transpose of `dispatch`, so each serves as the other's backward.

    Args:
        num_experts: Experts of the layer over all ranks.
        num_ranks: Ranks over which they are split evenly.
    """

    def __init__(self, num_experts: int, num_ranks: int) -> None:
        self.num_experts = num_experts
        self.num_ranks = num_ranks
        self.num_local_experts = num_experts // num_ranks

    @abstractmethod
    def route(self, ids_TK: Tensor, weights_TK: Tensor, x_TH: Tensor, hop: str) -> tuple[Plan, Pending]:
        """Decides what goes where, brings ids and weights to the ranks of their experts, and dispatches a first time.

        Args:
            ids_TK: Integer ``[T, K]``, global expert ids.
            weights_TK: ``[T, K]``, routing weights.
            x_TH: As in `dispatch`.
            hop: As in `dispatch`.

        Returns:
            The plan of this layer call, and the rows on their way.
        """

    @abstractmethod
    def dispatch(self, plan: Plan, x_TH: Tensor, hop: str) -> Pending:
        """Starts sending each token once more to every rank that serves it: ``[T, H]`` -> ``[N, H]``.

        Args:
            plan: The plan of this layer call.
            x_TH: One row per token.
            hop: What travels, for messages (``"dispatch"``, ``"combine, backward"``).
        """

    @abstractmethod
    def combine(self, plan: Plan, rows_NH: Tensor, hop: str) -> Pending:
        """Starts bringing rows back and summing them per token in at least fp32: ``[N, H]`` -> ``[T, H]``."""

    @abstractmethod
    def combine_slots(self, plan: Plan, values_NK: Tensor, hop: str) -> Pending:
        """Starts bringing one number per (row, slot) back to the slot it serves: ``[N, K]`` -> ``[T, K]``."""
