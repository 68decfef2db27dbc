"""Weights of experts with a low-rank product beside them (LoRA): ``W + scale * B A``, never made as one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ep.ops.grouped_mm import grouped_mm, grouped_outer

_ALIGNED = 8  # grouped GEMMs take strides of 16 bytes: 8 numbers in bf16


@dataclass(frozen=True)
class Adapter:
    """Which of a layer's weights has a low-rank product beside it.

    Attributes:
        weight: Its number among the weights.
        rank: Of the product, ``R``.
        scale: Of the product.
    """

    weight: int
    rank: int
    scale: float


class LowRank(NamedTuple):
    """The factors beside one weight.

    Attributes:
        a_ERA: ``[E, R, A]``; ``A`` features go in.
        b_EBR: ``[E, B, R]``; ``B`` come out.
        scale: Of their product.
    """

    a_ERA: Tensor
    b_EBR: Tensor
    scale: float

    def aligned(self) -> LowRank:
        """The same product with a rank that grouped GEMMs take: zeros are added."""
        missing = -self.a_ERA.shape[1] % _ALIGNED
        if missing == 0:
            return self
        return LowRank(F.pad(self.a_ERA, (0, 0, 0, missing)), F.pad(self.b_EBR, (0, missing)), self.scale)

    def beside(self, weight: Tensor, is_transposed: bool) -> Tensor:
        """The whole weight ``W + scale * B A``, differentiable, for code that knows no adapters.

        Args:
            weight: ``[E, B, A]``.
            is_transposed: It is ``[E, A, B]`` instead.
        """
        left, right = self.b_EBR, self.a_ERA
        if is_transposed:
            left, right = right.transpose(1, 2), left.transpose(1, 2)
        return torch.baddbmm(weight, left, right, alpha=self.scale)


def split(
    params: Sequence[Tensor], num_weights: int, adapters: Sequence[Adapter]
) -> tuple[Sequence[Tensor], list[LowRank | None]]:
    """The weights among the parameters of a call, and what is beside each.

    Args:
        params: The weights, then A and B of each of ``adapters``; or the weights alone, while adapters are off.
        num_weights: How many weights there are.
        adapters: Those of the layer.
    """
    beside: list[LowRank | None] = [None] * num_weights
    factors = params[num_weights:]
    for adapter, a_ERA, b_EBR in zip(adapters if factors else (), factors[::2], factors[1::2], strict=True):
        beside[adapter.weight] = LowRank(a_ERA, b_EBR, adapter.scale)
    return params[:num_weights], beside


class ExpertWeight(NamedTuple):
    """A weight of all local experts as grouped GEMMs apply it, with or without a low-rank product beside it.

    Attributes:
        weight_EBA: ``[E, B, A]``.
        low_rank: What is beside it.
    """

    weight_EBA: Tensor
    low_rank: LowRank | None

    def forward(self, x_PA: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor | None]:
        """The product with rows in expert order ``[P, B]``, and the rows in rank space ``[P, R]``, with the scale."""
        out_PB = grouped_mm(x_PA, self.weight_EBA.transpose(1, 2), offsets_E)
        if self.low_rank is None:
            return out_PB, None
        low_PR = self.project(x_PA, offsets_E)
        assert low_PR is not None
        return out_PB.add_(grouped_mm(low_PR, self.low_rank.b_EBR.transpose(1, 2), offsets_E)), low_PR

    def project(self, x_PA: Tensor, offsets_E: Tensor) -> Tensor | None:
        """``scale * x A^T`` ``[P, R]`` alone."""
        if self.low_rank is None:
            return None
        a_ERA, _, scale = self.low_rank
        return grouped_mm(x_PA, a_ERA.transpose(1, 2), offsets_E).mul_(scale)

    def backward_rows(self, grad_PB: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient of the rows ``[P, A]``, and the output's gradient in rank space ``[P, R]``, with the scale."""
        grad_PA = grouped_mm(grad_PB, self.weight_EBA, offsets_E)
        if self.low_rank is None:
            return grad_PA, None
        a_ERA, b_EBR, scale = self.low_rank
        grad_low_PR = grouped_mm(grad_PB, b_EBR, offsets_E).mul_(scale)
        return grad_PA.add_(grouped_mm(grad_low_PR, a_ERA, offsets_E)), grad_low_PR


class WeightGradients(NamedTuple):
    """What the gradients of an `ExpertWeight` and of its factors are made of, but for the rows.

    Attributes:
        grad_PB: The gradient of the product.
        low_PR: `ExpertWeight.project` of the rows, if there are factors.
        grad_low_PR: What `ExpertWeight.backward_rows` returned with the gradient of the rows.
    """

    grad_PB: Tensor
    low_PR: Tensor | None
    grad_low_PR: Tensor | None

    def gradients(
        self,
        x_PA: Tensor,
        offsets_E: Tensor,
        dtype: torch.dtype | None,
        factors: tuple[int, torch.dtype | None, torch.dtype | None] | None,
        is_transposed: bool = False,
    ) -> list[Tensor | None]:
        """Those of the weight ``[E, B, A]`` and, if it has ``factors``, of A ``[E, R, A]`` and B ``[E, B, R]``.

        Args:
            x_PA: The rows.
            offsets_E: Where each expert's rows end.
            dtype: Of the weight's gradient; None where it is not wanted, like that of the others.
            factors: Their rank, without what was added for alignment, and the dtypes of their gradients.
            is_transposed: The weight's is ``[E, A, B]`` instead.
        """
        left, right = (x_PA, self.grad_PB) if is_transposed else (self.grad_PB, x_PA)
        found = [None if dtype is None else grouped_outer(left, right, offsets_E, dtype)]
        if factors is None:
            return found
        rank, of_a, of_b = factors
        assert self.low_PR is not None
        assert self.grad_low_PR is not None
        a_ERA = None if of_a is None else grouped_outer(self.grad_low_PR, x_PA, offsets_E, of_a)[:, :rank]
        b_EBR = None if of_b is None else grouped_outer(self.grad_PB, self.low_PR, offsets_E, of_b)[..., :rank]
        return [*found, *(None if grad is None else grad.contiguous() for grad in (a_ERA, b_EBR))]
