"""Weights of experts with a low-rank product beside them (LoRA): ``W + scale * B A``, never made as one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ep.ops import kernels
from lightning_ep.ops.grouped_mm import grouped_mm, grouped_outer, rows_of

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


def project(x_PA: Tensor, factor_EAR: Tensor, scale: float, offsets_E: Tensor) -> Tensor:
    """``scale * x[of expert e] @ factor[e]`` for every expert ``[P, R]``, in at least fp32, rounded once.

    Args:
        x_PA: Rows in expert order.
        factor_EAR: ``[E, A, R]``, any strides.
        scale: Of the product.
        offsets_E: int32 ``[E]``, where each expert's rows end; the last one is ``P``.
    """
    if kernels.runs_on(x_PA):
        from lightning_ep.ops.kernels import low_rank as triton_low_rank

        return triton_low_rank.project(x_PA, factor_EAR, scale, offsets_E)
    return project_twin(x_PA, factor_EAR, scale, offsets_E)


def project_twin(x_PA: Tensor, factor_EAR: Tensor, scale: float, offsets_E: Tensor) -> Tensor:
    """Defines `project`, one expert after the other; synchronises with a GPU."""
    wide = torch.promote_types(x_PA.dtype, torch.float32)
    out_PR = x_PA.new_empty(x_PA.shape[0], factor_EAR.shape[2])
    for expert, rows in rows_of(offsets_E):
        out_PR[rows] = scale * (x_PA[rows].to(wide) @ factor_EAR[expert].to(wide))
    return out_PR


def outer_(out_EAR: Tensor, x_NA: Tensor, low_PR: Tensor, offsets_E: Tensor, row_P: Tensor | None = None) -> None:
    """``out[e] = x[of expert e].T @ low[of expert e]`` for every expert, in at least fp32; zero for those without rows.

    Args:
        out_EAR: ``[E, A, R]``, any strides and dtype.
        x_NA: Rows in expert order, or in any with ``row_P``.
        low_PR: In expert order, of rank ``R`` or, beyond what is wanted, more.
        offsets_E: int32 ``[E]``, where each expert's rows end; the last one is ``P``.
        row_P: int32 ``[P]``, which row of ``x_NA`` comes to each place in expert order.
    """
    if kernels.runs_on(x_NA):
        from lightning_ep.ops.kernels import low_rank as triton_low_rank

        triton_low_rank.outer_(out_EAR, x_NA, low_PR, offsets_E, row_P)
    else:
        outer_twin_(out_EAR, x_NA, low_PR, offsets_E, row_P)


def outer_twin_(out_EAR: Tensor, x_NA: Tensor, low_PR: Tensor, offsets_E: Tensor, row_P: Tensor | None = None) -> None:
    """Defines `outer_`, one expert after the other; synchronises with a GPU."""
    wide = torch.promote_types(x_NA.dtype, torch.float32)
    out_EAR.zero_()
    for expert, rows in rows_of(offsets_E):
        x_PA = x_NA[rows if row_P is None else row_P[rows]]
        out_EAR[expert] = x_PA.to(wide).t() @ low_PR[rows, : out_EAR.shape[2]].to(wide)


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

    def forward(self, x_PA: Tensor, offsets_E: Tensor, low_PR: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The product with rows in expert order ``[P, B]``, and `project` of the rows, unless it is there already."""
        low_PR = self.project(x_PA, offsets_E) if low_PR is None else low_PR
        beside = None if low_PR is None or self.low_rank is None else (low_PR, self.low_rank.b_EBR.transpose(1, 2))
        return grouped_mm(x_PA, self.weight_EBA.transpose(1, 2), offsets_E, beside), low_PR

    def project(self, x_PA: Tensor, offsets_E: Tensor) -> Tensor | None:
        """``scale * x A^T`` ``[P, R]``, the rows in rank space."""
        if self.low_rank is None:
            return None
        a_ERA, _, scale = self.low_rank
        return project(x_PA, a_ERA.transpose(1, 2), scale, offsets_E)

    def backward_rows(self, grad_PB: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient of the rows ``[P, A]``, and the output's gradient in rank space ``[P, R]``, with the scale."""
        if self.low_rank is None:
            return grouped_mm(grad_PB, self.weight_EBA, offsets_E), None
        a_ERA, b_EBR, scale = self.low_rank
        grad_low_PR = project(grad_PB, b_EBR, scale, offsets_E)
        return grouped_mm(grad_PB, self.weight_EBA, offsets_E, (grad_low_PR, a_ERA)), grad_low_PR


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
        x_NA: Tensor,
        offsets_E: Tensor,
        dtype: torch.dtype | None,
        factors: tuple[int, torch.dtype | None, torch.dtype | None] | None,
        is_transposed: bool = False,
        row_P: Tensor | None = None,
        beside_collective: bool = False,
    ) -> list[Tensor | None]:
        """Those of the weight ``[E, B, A]`` and, if it has ``factors``, of A ``[E, R, A]`` and B ``[E, B, R]``.

        Args:
            x_NA: The rows, in expert order if the weight's gradient is wanted.
            offsets_E: Where each expert's rows end.
            dtype: Of the weight's gradient; None where it is not wanted, like that of the others.
            factors: Their rank, without what was added for alignment, and the dtypes of their gradients.
            is_transposed: The weight's is ``[E, A, B]`` instead.
            row_P: As `outer_` takes it, for rows that are not in expert order.
            beside_collective: As `grouped_outer` takes it, for the weight's gradient.
        """
        left, right = (x_NA, self.grad_PB) if is_transposed else (self.grad_PB, x_NA)
        found = [None if dtype is None else grouped_outer(left, right, offsets_E, dtype, beside_collective)]
        if factors is None:
            return found
        rank, of_a, of_b = factors
        assert self.low_PR is not None
        assert self.grad_low_PR is not None
        a_ERA = b_EBR = None
        if of_a is not None:
            a_ERA = x_NA.new_empty(offsets_E.shape[0], rank, x_NA.shape[1], dtype=of_a)
            outer_(a_ERA.transpose(1, 2), x_NA, self.grad_low_PR, offsets_E, row_P)
        if of_b is not None:
            b_EBR = x_NA.new_empty(offsets_E.shape[0], self.grad_PB.shape[1], rank, dtype=of_b)
            outer_(b_EBR, self.grad_PB, self.low_PR, offsets_E)
        return [*found, a_ERA, b_EBR]
