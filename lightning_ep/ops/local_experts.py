"""The experts of one rank behind one interface, so that `moe.py` can order them without knowing any GEMM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class LocalExperts(ABC):
    """A forward/backward pair over the rows that one rank received; it keeps no tensor of a call on itself.

    The backward is in two parts, so that the gradients of the rows can travel home under the weight-gradient GEMMs.

    Attributes:
        keeps_rows: Whether what a forward saves holds the received rows.
    """

    keeps_rows: bool

    @abstractmethod
    def forward(
        self,
        rows_NH: Tensor,
        ids_NK: Tensor,
        weights_NK: Tensor,
        num_pairs: int,
        params: Sequence[Tensor],
        keep: bool,
    ) -> tuple[Tensor, Any]:
        """Computes every row's weighted sum over its local experts.

        Args:
            rows_NH: Received rows ``[N, H]``, at least one.
            ids_NK: Integer ``[N, K]``, local expert ids; the number of local experts in empty slots.
            weights_NK: ``[N, K]``, routing weights.
            num_pairs: Number of slots that are not empty.
            params: The local parameters, in the dtype of the rows: the experts' weights, and behind them the factors
                of adapters, if these are there and not off.
            keep: Whether tensors of the size of the rows are kept for a backward. Otherwise it gets the rows again.

        Returns:
            ``[N, H]`` in the dtype of the rows, summed in at least fp32, and what `backward_rows` needs.
        """

    def prepare_backward(self, saved: Any, trained: Sequence[bool]) -> Any:
        """Does what a backward needs and what can be done before its gradient is here; by default nothing.

        Args:
            saved: What `forward` returned.
            trained: Of each parameter, whether its gradient is wanted.

        Returns:
            What `backward_rows` gets in the place of ``saved``.
        """
        return saved

    @abstractmethod
    def backward_rows(
        self,
        saved: Any,
        params: Sequence[Tensor],
        grad_NH: Tensor,
        rows: Callable[[], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Differentiates one forward with respect to what came with the rows.

        Args:
            saved: What `forward` returned, or `prepare_backward`.
            params: The parameters, as `forward` got them.
            grad_NH: ``[N, H]``, gradient of the rows that forward returned.
            rows: Waits for the rows, as `forward` got them, if it has not kept them. It is called once, after what can
                be done without them, and as much of the forward as is needed is then repeated.

        Returns:
            Gradients of the rows ``[N, H]`` (summed in at least fp32) and of the routing weights ``[N, K]``, each in
            the dtype of what it belongs to, and what `backward_params` needs.
        """

    @abstractmethod
    def backward_params(self, saved: Any, dtypes: Sequence[torch.dtype | None]) -> tuple[Tensor | None, ...]:
        """Finishes a backward: the gradients of the parameters, zero for experts without rows, None where frozen.

        Args:
            saved: What `backward_rows` returned.
            dtypes: Of the gradients, None for parameters that are frozen.
        """
