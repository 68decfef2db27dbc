"""Moving rows between token order and expert order, with sums in fp32 and in a fixed order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def gather_sum(rows_NH: Tensor, index_TK: Tensor) -> Tensor:
    """Sums, for every output row, the input rows that its slots name.

    The sum runs over the slots from first to last in at least fp32, so it is the same on every layout and every run
    (no atomics).

    Args:
        rows_NH: Rows ``[N, H]``, any floating dtype.
        index_TK: int64 ``[T, K]``, the row of each slot, or -1 for a slot that adds nothing.

    Returns:
        ``[T, H]``; float64 for float64 rows, float32 for all others.
    """
    dtype = torch.promote_types(rows_NH.dtype, torch.float32)
    out_TH = rows_NH.new_zeros(index_TK.shape[0], rows_NH.shape[1], dtype=dtype)
    if rows_NH.shape[0] == 0:
        return out_TH
    for index_T in index_TK.unbind(1):
        picked_TH = rows_NH.index_select(0, index_T.clamp_min(0))
        out_TH += picked_TH.masked_fill_((index_T < 0).unsqueeze(1), 0)
    return out_TH


class ExpertOrder(NamedTuple):
    """How ``P`` (row, expert) pairs lie when sorted by expert.

    Attributes:
        row_P: int64 ``[P]``, the row of each pair.
        slot_P: int64 ``[P]``, the column of the pair in the ids.
        expert_P: int64 ``[P]``, the expert of each pair, ascending.
        pair_NK: int64 ``[N, K]``, where each slot's pair lies in ``0..P-1``, or -1 for an empty slot.
    """

    row_P: Tensor
    slot_P: Tensor
    expert_P: Tensor
    pair_NK: Tensor


def expert_order(ids_NK: Tensor, num_pairs: int) -> ExpertOrder:
    """Sorts the (row, expert) pairs by expert, then by row.

    Args:
        ids_NK: int64 ``[N, K]``, local expert ids; empty slots hold an id larger than every expert's.
        num_pairs: ``P``, the number of slots that are not empty (known on the host, so that nothing synchronises).
    """
    ids = ids_NK.reshape(-1)
    order_P = torch.argsort(ids, stable=True)[:num_pairs]
    pair_NK = torch.full_like(ids, -1)
    pair_NK[order_P] = torch.arange(num_pairs, device=ids.device)
    top_k = ids_NK.shape[1]
    return ExpertOrder(
        row_P=order_P // top_k, slot_P=order_P % top_k, expert_P=ids[order_P], pair_NK=pair_NK.view_as(ids_NK)
    )
