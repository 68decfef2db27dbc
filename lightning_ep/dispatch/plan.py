"""Which row goes where, from the router's choice: one row per (token, destination rank)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """Frozen metadata of one exchange; both directions of forward and backward use the same one.

    Sizes: ``T`` tokens of this rank, ``K`` experts per token, ``S`` rows sent, ``N`` rows received.

    Attributes:
        token_S: int64 ``[S]``, the token of every sent row, grouped by destination rank.
        row_TK: int64 ``[T, K]``, the sent row that carries each slot.
        first_TK: int64 ``[T, K]``, the same at the first slot of every (token, destination), -1 at the others.
        send_splits: Rows sent to each rank.
        recv_splits: Rows received from each rank.
        ids_NK: int64 ``[N, K]``, local expert ids of the received rows; ``num_local_experts`` in slots that other
            ranks serve.
        num_pairs: Number of (row, expert) pairs among the received rows.
    """

    token_S: Tensor
    row_TK: Tensor
    first_TK: Tensor
    send_splits: tuple[int, ...]
    recv_splits: tuple[int, ...]
    ids_NK: Tensor
    num_pairs: int


@dataclass(frozen=True)
class Destinations:
    """Where each token's rows go, before any size is known on the host.

    Attributes:
        row_TK: int64 ``[T, K]``, position of the row that carries each slot.
        first_TK: int64 ``[T, K]``, the same at the first slot of every (token, destination), -1 at the others.
        position_DT: int64 ``[D, T]``, running count of rows over destinations, then tokens.
        chosen_DT: bool ``[D, T]``, whether the token goes to the destination.
        counts_D2: int64 ``[D, 2]``, rows and (row, expert) pairs for each destination.
    """

    row_TK: Tensor
    first_TK: Tensor
    position_DT: Tensor
    chosen_DT: Tensor
    counts_D2: Tensor

    def source_of_row(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Token and destination of every row, int64 ``[S]`` each, once ``S`` is known on the host."""
        num_ranks, num_tokens = self.chosen_DT.shape
        pair_DT = torch.arange(num_ranks * num_tokens, device=self.row_TK.device)
        # Pairs that are not chosen write to one row past the end, so that no boolean indexing (a sync) is needed.
        target_DT = torch.where(self.chosen_DT, self.position_DT, num_rows).reshape(-1)
        pair_S = self.row_TK.new_empty(num_rows + 1).scatter_(0, target_DT, pair_DT)[:num_rows]
        return pair_S % max(num_tokens, 1), pair_S // max(num_tokens, 1)


def destinations(ids_TK: Tensor, num_local_experts: int, num_ranks: int) -> Destinations:
    """Deduplicates the router's choice: a token that picks several experts of one rank goes there once.

    Args:
        ids_TK: int64 ``[T, K]``, global expert ids; rank ``d`` holds ``d * num_local_experts`` and those after it.
        num_local_experts: Experts per rank.
        num_ranks: Ranks of the EP group.
    """
    num_tokens = ids_TK.shape[0]
    owner_TK = ids_TK // num_local_experts
    chosen_DT = torch.zeros(num_ranks, num_tokens, dtype=torch.bool, device=ids_TK.device)
    chosen_DT.scatter_(0, owner_TK.t(), True)
    # One flat cumsum: along the outer dimension of [T, D] it cost 1.5 ms per layer on an H200.
    position_DT = (chosen_DT.reshape(-1).cumsum(0) - 1).view(num_ranks, num_tokens)
    row_TK = position_DT.t().gather(1, owner_TK)
    repeats_TK = (owner_TK.unsqueeze(2) == owner_TK.unsqueeze(1)).tril(-1).any(-1)
    pairs_D = torch.zeros(num_ranks, dtype=torch.int64, device=ids_TK.device)
    pairs_D.scatter_add_(0, owner_TK.reshape(-1), torch.ones_like(owner_TK).reshape(-1))
    return Destinations(
        row_TK=row_TK,
        first_TK=row_TK.masked_fill(repeats_TK, -1),
        position_DT=position_DT,
        chosen_DT=chosen_DT,
        counts_D2=torch.stack([chosen_DT.sum(1), pairs_D], dim=1),
    )
