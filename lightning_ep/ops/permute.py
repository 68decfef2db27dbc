"""Moving rows between token order and expert order, with sums in fp32 and in a fixed order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ep.ops import kernels


class ExpertOrder(NamedTuple):
    """How ``P`` (row, expert) pairs lie when sorted by expert, and by row within an expert.

    A *slot* is a place in the ids ``[N, K]``, numbered row by row.

    Attributes:
        slot_P: int32 ``[P]``, the slot of each pair.
        pair_NK: int32 ``[N, K]``, where each slot's pair lies in ``0..P-1``, or -1 for an empty slot.
        offsets_E: int32 ``[E]``, where each expert's pairs end.
    """

    slot_P: Tensor
    pair_NK: Tensor
    offsets_E: Tensor

    @property
    def row_P(self) -> Tensor:
        """int32 ``[P]``, the row of each pair."""
        return self.slot_P // self.pair_NK.shape[1]

    def permute(self, rows_NH: Tensor) -> Tensor:
        """Rows in expert order, one for each pair: ``[N, H]`` -> ``[P, H]``."""
        return permute(rows_NH, self.pair_NK, self.slot_P.shape[0])


def expert_order(ids_NK: Tensor, num_experts: int, num_pairs: int) -> ExpertOrder:
    """Sorts the (row, expert) pairs by expert, then by row.

    Args:
        ids_NK: Integer ``[N, K]``, local expert ids in ``0..num_experts-1``; ``num_experts`` in empty slots.
        num_experts: ``E``.
        num_pairs: ``P``, the number of slots that are not empty (known on the host, so that nothing synchronises).
    """
    if kernels.runs_on(ids_NK):
        from lightning_ep.ops.kernels import permute as triton_permute

        return ExpertOrder(*triton_permute.expert_order(ids_NK, num_experts, num_pairs))
    return expert_order_twin(ids_NK, num_experts, num_pairs)


def expert_order_twin(ids_NK: Tensor, num_experts: int, num_pairs: int) -> ExpertOrder:
    """Defines `expert_order`, in PyTorch."""
    ids = ids_NK.reshape(-1)
    slot_P = torch.argsort(ids, stable=True)[:num_pairs]
    pair_NK = torch.full_like(ids, -1, dtype=torch.int32)
    pair_NK[slot_P] = torch.arange(num_pairs, device=ids.device, dtype=torch.int32)
    expert_E = torch.arange(num_experts, device=ids.device, dtype=ids.dtype)
    offsets_E = torch.searchsorted(ids[slot_P], expert_E, right=True)
    return ExpertOrder(slot_P.int(), pair_NK.view_as(ids_NK), offsets_E.int())


def permute(rows_NH: Tensor, place_NK: Tensor, num_places: int, out_PH: Tensor | None = None) -> Tensor:
    """Copies every row to its places: ``[N, H]`` -> ``[P, H]``. `gather_sum` with the same places is the transpose.

    Args:
        rows_NH: Rows with one unit stride.
        place_NK: Integer ``[N, K]``, where the copies of each row go; -1 for none. No place is in it twice.
        num_places: ``P``. Places that are not in ``place_NK`` are left unset.
        out_PH: Where to write, rows with one unit stride; by default a new tensor.
    """
    if kernels.runs_on(rows_NH):
        from lightning_ep.ops.kernels import permute as triton_permute

        return triton_permute.permute(rows_NH, place_NK, num_places, out_PH)
    copied_PH = permute_twin(rows_NH, place_NK, num_places)
    return copied_PH if out_PH is None else out_PH.copy_(copied_PH)


def permute_twin(rows_NH: Tensor, place_NK: Tensor, num_places: int) -> Tensor:
    """Defines `permute`, in PyTorch."""
    slot_P = place_NK.new_zeros(num_places + 1, dtype=torch.int64)
    place = place_NK.reshape(-1).long()
    slot_P[torch.where(place < 0, num_places, place)] = torch.arange(place.numel(), device=place.device)
    return rows_NH[slot_P[:num_places] // place_NK.shape[1]]


def gather_sum(rows_NH: Tensor, index_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums, for every output row, the input rows that its slots name.

    The sum runs over the slots from first to last in fp32 (float64 for float64 rows), so it is the same on every layout
    and every run (no atomics).

    Args:
        rows_NH: Rows ``[N, H]``, any floating dtype.
        index_TK: Integer ``[T, K]``, the row of each slot, or -1 for a slot that adds nothing.
        dtype: Of the result.

    Returns:
        ``[T, H]``.
    """
    if kernels.runs_on(rows_NH):
        from lightning_ep.ops.kernels import permute as triton_permute

        return triton_permute.gather_sum(rows_NH, index_TK, dtype)
    return gather_sum_twin(rows_NH, index_TK, dtype)


def gather_sum_twin(rows_NH: Tensor, index_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """Defines `gather_sum`, in PyTorch."""
    accumulate = torch.promote_types(rows_NH.dtype, torch.float32)
    out_TH = rows_NH.new_zeros(index_TK.shape[0], rows_NH.shape[1], dtype=accumulate)
    if rows_NH.shape[0] > 0:
        for index_T in index_TK.unbind(1):
            picked_TH = rows_NH.index_select(0, index_T.clamp_min(0))
            out_TH += picked_TH.masked_fill_((index_T < 0).unsqueeze(1), 0)
    return out_TH.to(dtype)
