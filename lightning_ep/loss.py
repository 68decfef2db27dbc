"""The summed token loss of a causal language model, without its logits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.fsdp.passes import run_as_forward
from lightning_ep.ops.cross_entropy import IGNORE
from lightning_ep.tensor_parallel.vocabulary import head_cross_entropy, is_plain_head


@dataclass(frozen=True)
class _Head:
    """What is remembered of a model: whether its logits are all that its head does, so that the loss may replace it."""

    gives_the_logits: bool


def token_losses(model: PreTrainedModel, targets_BS: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Losses of single tokens from the model's logits.

    Args:
        model: The model.
        targets_BS: int64 ``[B, S]``, the target of every position, or -100.
        inputs: Arguments of the model's forward.

    Returns:
        ``[B, S]`` in fp32, zero where there is no target, and the model's auxiliary loss (0-dim, zero if it has none).
    """
    with _masks(inputs):
        output = model(**inputs, use_cache=False)
    logits_TV = output.logits.float().flatten(0, 1)
    losses_T = F.cross_entropy(logits_TV, targets_BS.flatten(), ignore_index=IGNORE, reduction="none")
    return losses_T.view_as(targets_BS), _auxiliary(output, losses_T)


def summed_loss(model: PreTrainedModel, targets_BS: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Sum of the token losses, through `linear_cross_entropy` where the model's logits are its head's output.

    Models that scale or cap their logits, and heads with a bias, take the plain path over all logits.

    Args:
        model: The model, sharded or not.
        targets_BS: As in `token_losses`.
        inputs: As in `token_losses`.

    Returns:
        0-dim fp32 tensor, and the auxiliary loss as in `token_losses`.
    """
    head = adapter.recall(model, _Head) or _Head(is_plain_head(model.get_output_embeddings()))
    if head.gives_the_logits:
        # What no layer holds is gathered only inside a forward of the root, and this is one.
        found: tuple[Tensor, Tensor] | None = run_as_forward(model, partial(_fused, model), targets_BS, inputs)
        if found is not None:
            adapter.remember(model, head)
            return found
        rank_zero_info(f"{type(model).__name__} changes its logits after the head: the loss holds them all.")
    adapter.remember(model, _Head(False))
    losses_BS, auxiliary = token_losses(model, targets_BS, inputs)
    return losses_BS.sum(), auxiliary


def _fused(model: PreTrainedModel, targets_BS: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """One forward with the loss in place of the head; None if the model does more to logits than its head does."""
    head: Any = model.get_output_embeddings()
    found: list[tuple[Tensor, Tensor]] = []

    def forward(hidden_BSH: Tensor) -> Tensor:
        loss = head_cross_entropy(head, hidden_BSH.flatten(0, 1), targets_BS.flatten(), IGNORE)
        # Detached, what stands for the logits has no backward, before which FSDP would gather the head once more.
        logits_BSH = hidden_BSH.detach()
        found.append((loss, logits_BSH))
        return logits_BSH

    # On the module itself: its weight is gathered inside a call of it, and the model finds it where it looks for it.
    head.forward = forward
    try:
        # Not `model(...)`: the hooks around a forward of the root run around this function already.
        with _masks(inputs):
            output = model.forward(**inputs, use_cache=False)
    finally:
        del head.forward
    if len(found) != 1 or output.logits is not found[0][1]:
        return None
    loss, _ = found[0]
    return loss, _auxiliary(output, loss)


def _masks(inputs: dict[str, Any]) -> AbstractContextManager[None]:
    return nullcontext() if "position_ids" in inputs else adapter.without_packing()


def _auxiliary(output: Any, like: Tensor) -> Tensor:
    auxiliary = getattr(output, "aux_loss", None)
    return like.new_zeros(()) if auxiliary is None else auxiliary
