"""Which row goes where, from the router's choice: one row per (token, destination rank)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ep.ops import kernels


class Destinations(NamedTuple):
    """Where each token's rows go. Rows are numbered by destination, then by token; ``S`` of them are sent.

    Attributes:
        row_TK: int64 ``[T, K]``, the row that carries each slot.
        first_TK: int32 ``[T, K]``, the same at the first slot of every (token, destination), -1 at the others.
        counts_2D2: int64 ``[2, D, 2]``, first the rows and the (row, expert) pairs for each destination, then room for
            what each of them says of this rank.
    """

    row_TK: Tensor
    first_TK: Tensor
    counts_2D2: Tensor


def destinations(
    ids_TK: Tensor, weights_TK: Tensor, num_local_experts: int, num_ranks: int, slots_S2K: Tensor
) -> Destinations:
    """Deduplicates the router's choice: a token that picks several experts of one rank goes there once.

    No size is needed on the host, so nothing synchronises.

    Args:
        ids_TK: Integer ``[T, K]``, global expert ids; rank ``d`` holds ``d * num_local_experts`` and those after it.
        weights_TK: ``[T, K]``, routing weights.
        num_local_experts: Experts per rank.
        num_ranks: Ranks of the EP group.
        slots_S2K: Where to write what travels with each row, at least ``T min(K, D)`` rows of ``[2 K]`` with one unit
            stride: the expert ids local to the destination (``num_local_experts`` in slots that other ranks serve),
            then the bits of the routing weights; in the dtypes of `wire_dtypes`. Rows past the last sent are left.
    """
    if kernels.runs_on(ids_TK, weights_TK):
        from lightning_ep.ops.kernels import routing as triton_routing

        return Destinations(*triton_routing.destinations(ids_TK, weights_TK, num_local_experts, num_ranks, slots_S2K))
    return destinations_twin(ids_TK, weights_TK, num_local_experts, num_ranks, slots_S2K)


def destinations_twin(
    ids_TK: Tensor, weights_TK: Tensor, num_local_experts: int, num_ranks: int, slots_S2K: Tensor
) -> Destinations:
    """Defines `destinations`, in PyTorch."""
    ids_TK = ids_TK.long()
    owner_TK = ids_TK // num_local_experts
    chosen_DT = torch.zeros(num_ranks, ids_TK.shape[0], dtype=torch.bool, device=ids_TK.device)
    chosen_DT.scatter_(0, owner_TK.t(), True)
    position_DT = (chosen_DT.reshape(-1).cumsum(0) - 1).view_as(chosen_DT)
    row_TK = position_DT.t().gather(1, owner_TK)
    repeats_TK = (owner_TK.unsqueeze(2) == owner_TK.unsqueeze(1)).tril(-1).any(-1)
    rank_S, token_S = chosen_DT.nonzero(as_tuple=True)
    ids_SK = ids_TK[token_S] - (rank_S * num_local_experts).unsqueeze(1)
    elsewhere_SK = (ids_SK < 0) | (ids_SK >= num_local_experts)
    ids_SK = ids_SK.masked_fill(elsewhere_SK, num_local_experts)
    values, bits = wire_dtypes(weights_TK.dtype)
    weights_SK = weights_TK[token_S].to(values)
    slots_S2K[: ids_SK.shape[0]] = torch.cat([ids_SK.to(bits), weights_SK.view(bits)], dim=1)
    pairs_D = torch.bincount(owner_TK.reshape(-1), minlength=num_ranks)
    counts_D2 = torch.stack([chosen_DT.sum(1), pairs_D], dim=1)
    first_TK = row_TK.masked_fill(repeats_TK, -1).int()
    return Destinations(row_TK, first_TK, torch.stack([counts_D2, torch.zeros_like(counts_D2)]))


def wire_dtypes(weights: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """In which dtype routing weights travel, and the integer of the same size."""
    return (torch.float64, torch.int64) if weights == torch.float64 else (torch.float32, torch.int32)


def split_slots(slots_N2K: Tensor) -> tuple[Tensor, Tensor]:
    """What `destinations` has written: views of local ids and routing weights, ``[N, K]`` each."""
    ids_NK, bits_NK = slots_N2K.chunk(2, dim=1)
    return ids_NK, bits_NK.view(torch.float64 if bits_NK.dtype == torch.int64 else torch.float32)
