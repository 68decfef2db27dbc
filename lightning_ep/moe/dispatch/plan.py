"""What one exchange of a layer needs to know."""

from __future__ import annotations

from dataclasses import dataclass

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
