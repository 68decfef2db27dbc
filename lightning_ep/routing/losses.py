"""Losses on router logits: sums that a layer makes as it runs, and what becomes of the sums of all layers and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ep.transformers_adapter import Scoring


class _Sums(torch.autograd.Function):
    """`sums_of_layer`, which keeps for backward no more than the logits: what it makes of them it makes again there."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, counted_T: Tensor | None, scoring: Scoring) -> Tensor:
        ctx.save_for_backward(logits_TE)
        ctx.counted_T, ctx.scoring = counted_T, scoring
        return _sums(logits_TE, counted_T, scoring)

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor, None, None]:
        (logits_TE,) = ctx.saved_tensors
        with torch.enable_grad():
            again_TE = logits_TE.detach().requires_grad_()
            (grad_TE,) = torch.autograd.grad(_sums(again_TE, ctx.counted_T, ctx.scoring), again_TE, grad_S)
        return grad_TE, None, None


def sums_of_layer(logits_TE: Tensor, counted_T: Tensor | None, scoring: Scoring) -> Tensor:
    """What the losses need of one layer, so that nobody holds on to its logits but its own backward.

    Args:
        logits_TE: ``[T, E]``.
        counted_T: Bool ``[T]``, the tokens that count; None for all.
        scoring: As the family has it; sigmoids are divided by their sum over experts (DeepSeek-V3, eq. 17 to 20).

    Returns:
        ``[E + 1]`` in fp32 or more: sums over tokens of each expert's probability, and of squared logsumexp.
    """
    return _Sums.apply(logits_TE, counted_T, scoring)


def probabilities(logits_TE: Tensor, scoring: Scoring) -> Tensor:
    """A router's probabilities of experts, ``[T, E]`` in fp32 or more: of sigmoids, their shares of the sum."""
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if scoring == "softmax":
        return logits_TE.softmax(1)
    if scoring == "sigmoid":
        scores_TE = logits_TE.sigmoid()
        return scores_TE / scores_TE.sum(1, keepdim=True)
    return logits_TE


def _sums(logits_TE: Tensor, counted_T: Tensor | None, scoring: Scoring) -> Tensor:
    probabilities_TE = probabilities(logits_TE, scoring)
    if scoring == "probabilities":
        squares_T1 = torch.zeros_like(probabilities_TE[:, :1])  # there are no logits
    else:
        squares_T1 = logits_TE.to(probabilities_TE.dtype).logsumexp(1, keepdim=True).square()
    rows_TS = torch.cat([probabilities_TE, squares_T1], 1)
    return rows_TS.sum(0) if counted_T is None else (rows_TS * counted_T[:, None]).sum(0)


def balance_per_layer(counts_LE: Tensor, sums_LE: Tensor, tokens_L: Tensor, num_experts_L: Tensor) -> Tensor:
    """``E sum_e f_e P_e`` of every layer, ``[L]``; linear in the probabilities.

    Args:
        counts_LE: Choices of all ranks.
        sums_LE: Sums of probabilities: all ranks' for the value, this rank's for its part, which sum to the value.
        tokens_L: Tokens of all ranks that count, 1 where there are none.
        num_experts_L: Experts.
    """
    return num_experts_L * (counts_LE / tokens_L[:, None] * sums_LE / tokens_L[:, None]).sum(1)


def balance_of_all_layers(counts_LE: Tensor, sums_LE: Tensor, tokens_L: Tensor, num_experts: int) -> Tensor:
    """As transformers' ``load_balancing_loss_func``: shares and probabilities over the tokens of all layers, 0-dim."""
    tokens = tokens_L.sum()
    return num_experts * (counts_LE.sum(0) / tokens * sums_LE.sum(0) / tokens).sum()
