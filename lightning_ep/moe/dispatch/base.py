"""What one exchange of a layer needs to know, and the interface behind which rows travel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """Frozen metadata of one layer call; both directions of forward and backward use the same one.

    Sizes: ``T`` tokens of this rank, ``K`` experts per token, ``N`` rows received.

    Attributes:
        ids_NK: Integer ``[N, K]``, local expert ids of the received rows; the number of local experts in slots that
            other ranks serve.
        weights_NK: ``[N, K]``, routing weights of the received rows.
        num_pairs: Number of (row, expert) pairs among the received rows.
    """

    ids_NK: Tensor
    weights_NK: Tensor
    num_pairs: int

    def without_rows(self) -> DispatchPlan:
        """The same plan, once the rows have arrived, for those who keep it but not the rows: without their memory."""
        return self


class ExplainedOutOfMemoryError(torch.OutOfMemoryError):
    """Its message says what ran out of memory, so that nothing around it takes the error for its own."""


class Pending:
    """A transfer that has been started; `wait` finishes it and returns its tensor.

    Attributes:
        travels: Whether it takes time, which other work may fill.
    """

    def __init__(self, finish: Callable[[], Tensor], travels: bool = True) -> None:
        self._finish = finish
        self.travels = travels

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
        layer: Name of the layer, for messages.
    """

    def __init__(self, num_experts: int, num_ranks: int, layer: str) -> None:
        self.num_experts = num_experts
        self.num_ranks = num_ranks
        self.layer = layer
        self.num_local_experts = num_experts // num_ranks

    @abstractmethod
    def route(self, ids_TK: Tensor, weights_TK: Tensor, x_TH: Tensor, hop: str) -> Callable[[], tuple[Plan, Pending]]:
        """Starts to decide what goes where.

        Args:
            ids_TK: Integer ``[T, K]``, global expert ids.
            weights_TK: ``[T, K]``, routing weights.
            x_TH: As in `dispatch`.
            hop: As in `dispatch`.

        Returns:
            What has the host wait until it is decided, and dispatches a first time, with the ids and weights: gives the
            plan of this layer call, and the rows on their way. Work that the GPU is given before fills that time.
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

    @abstractmethod
    def describe(self, plan: Plan) -> str:
        """How much this rank has received in a layer call, against what it has sent; for messages."""

    @contextmanager
    def explains_out_of_memory(self, describe: Callable[[], str]) -> Iterator[None]:
        """Says in out-of-memory errors how many rows a layer call has brought to this rank.

        Args:
            describe: Gives `describe` of the call's plan.
        """
        try:
            yield
        except ExplainedOutOfMemoryError:
            raise
        except torch.OutOfMemoryError as error:
            raise ExplainedOutOfMemoryError(
                f"Out of memory in {self.layer}: {describe()}. Use activation_checkpointing='full' or fewer tokens per "
                f"batch; where a rank receives far more than its share, the router needs balancing. {error}"
            ) from error
