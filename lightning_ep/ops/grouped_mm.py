"""One matrix product per expert, on rows that lie in expert order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(
    x_PA: Tensor, weight_EAB: Tensor, offsets_E: Tensor, beside: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``x[of expert e] @ weight[e]`` for every expert: ``[P, A]`` -> ``[P, B]``.

    Args:
        x_PA: Rows in expert order.
        weight_EAB: ``[E, A, B]``, any strides with one unit stride.
        offsets_E: int32 ``[E]``, where each expert's rows end; the last one is ``P``.
        beside: ``[P, R]`` and ``[E, R, B]``, whose product is added. With the kernel for Hopper it is a few steps more
            of the same sum, so that no result is written but the last.
    """
    if x_PA.is_cuda:
        from lightning_ep.ops.kernels import grouped_mm as triton_grouped_mm

        if triton_grouped_mm.serves(x_PA, weight_EAB, beside):
            return triton_grouped_mm.grouped_mm(x_PA, weight_EAB, offsets_E, beside)
    if _fast(x_PA, weight_EAB, *weight_EAB.shape[1:]):
        out_PB = F.grouped_mm(x_PA, weight_EAB, offs=offsets_E)
        return out_PB if beside is None else out_PB.add_(grouped_mm(*beside, offsets_E))
    return grouped_mm_twin(x_PA, weight_EAB, offsets_E, beside)


def grouped_mm_twin(
    x_PA: Tensor, weight_EAB: Tensor, offsets_E: Tensor, beside: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Defines `grouped_mm`, one expert after the other; synchronises with a GPU."""
    out_PB = x_PA.new_empty(x_PA.shape[0], weight_EAB.shape[2])
    for expert, rows in rows_of(offsets_E):
        if beside is None:
            torch.mm(x_PA[rows], weight_EAB[expert], out=out_PB[rows])
        else:
            low_PR, factor_ERB = beside
            wide = torch.promote_types(x_PA.dtype, torch.float32)
            added = low_PR[rows].to(wide) @ factor_ERB[expert].to(wide)
            out_PB[rows] = added.addmm_(x_PA[rows].to(wide), weight_EAB[expert].to(wide))
    return out_PB


def grouped_outer(
    x_PA: Tensor, y_PB: Tensor, offsets_E: Tensor, dtype: torch.dtype, beside_collective: bool = False
) -> Tensor:
    """``x[of expert e].T @ y[of expert e]`` for every expert, zero for those without rows: ``[E, A, B]``.

    Args:
        x_PA: Rows in expert order.
        y_PB: Likewise.
        offsets_E: int32 ``[E]``, where each expert's rows end; the last one is ``P``.
        dtype: Of the result.
        beside_collective: Whether one has begun that is to be hidden under this.
    """
    if not _fast(x_PA, y_PB, x_PA.shape[1], y_PB.shape[1]):
        return grouped_outer_twin(x_PA, y_PB, offsets_E).to(dtype)
    out_EAB = _beside_collective(x_PA, y_PB, offsets_E) if beside_collective else None
    if out_EAB is None:
        out_EAB = F.grouped_mm(x_PA.t(), y_PB, offs=offsets_E)
    return out_EAB if out_EAB.dtype == dtype else _cast(out_EAB, dtype)


def _beside_collective(x_PA: Tensor, y_PB: Tensor, offsets_E: Tensor) -> Tensor | None:
    """`grouped_outer` on the multiprocessors that a collective leaves; None where the kernel does not serve."""
    from lightning_ep.ops.kernels import grouped_outer as triton_grouped_outer

    if not triton_grouped_outer.serves(x_PA, y_PB, offsets_E.shape[0]):
        return None
    return triton_grouped_outer.grouped_outer(x_PA, y_PB, offsets_E)


def grouped_outer_twin(x_PA: Tensor, y_PB: Tensor, offsets_E: Tensor) -> Tensor:
    """Defines `grouped_outer`, one expert after the other; synchronises with a GPU."""
    out_EAB = x_PA.new_zeros(offsets_E.shape[0], x_PA.shape[1], y_PB.shape[1])
    for expert, rows in rows_of(offsets_E):
        torch.mm(x_PA[rows].t(), y_PB[rows], out=out_EAB[expert])
    return out_EAB


def grouped_sum(x_PA: Tensor, offsets_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Each expert's sum of its rows, zero without rows: ``[E, A]``.

    Args:
        x_PA: Rows in expert order.
        offsets_E: int32 ``[E]``, where each expert's rows end; the last one is ``P``.
        dtype: Of the result.
    """
    ones_P8 = x_PA.new_ones(x_PA.shape[0], 8)  # as many columns as grouped GEMMs take at least
    return grouped_outer(ones_P8, x_PA, offsets_E, dtype)[:, 0].contiguous()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # From bf16 to fp32 `x.to` reaches half of an H200's bandwidth, and these are whole layers of gradients.
    out = torch.empty_like(x, dtype=dtype)
    torch._foreach_copy_([out], [x])
    return out


def _fast(x: Tensor, y: Tensor, *sizes: int) -> bool:
    """Whether torch has a kernel: bf16 on CUDA, rows of a multiple of 16 bytes."""
    return x.is_cuda and x.dtype == y.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)


def rows_of(offsets_E: Tensor) -> list[tuple[int, slice]]:
    """The experts that have rows, with their rows; synchronises with a GPU."""
    ends = offsets_E.tolist()
    starts = [0, *ends[:-1]]
    return [(e, slice(s, t)) for e, (s, t) in enumerate(zip(starts, ends, strict=True)) if t > s]
