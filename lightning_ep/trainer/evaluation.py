"""The mean token loss of an evaluation, over the tokens of all ranks and dataloaders."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_ep.ops.cross_entropy import IGNORE
from lightning_ep.trainer.loaders import evaluated_loaders


def log_token_means(module: LightningModule, stage: str, sums: Mapping[int, Tensor]) -> None:
    """Logs an evaluation at its end: ``<stage>/loss``, its perplexity, and the loss of each of several dataloaders.

    Args:
        module: What logs.
        stage: "val" or "test".
        sums: float64 ``[2]``, this rank's sums of token losses and of tokens, by the number of the dataloader.

    Raises:
        ValueError: If no token of any rank had a target; of a sanity check only a warning, for others may have some.
    """
    names = evaluated_loaders(module.trainer)
    sums_N2 = torch.zeros(len(names), 2, dtype=torch.float64, device=module.device)
    for index, sums_2 in sums.items():
        sums_N2[index] = sums_2
    if dist.is_initialized():
        dist.all_reduce(sums_N2)
    loss, tokens = sums_N2.sum(0)
    if tokens == 0:
        explain_no_targets(module, stage, had_batches=bool(sums))
        return
    for name, (loss_of_one, tokens_of_one) in zip(names, sums_N2, strict=True):
        if len(names) > 1 and tokens_of_one > 0:
            module.log(f"{stage}/loss/{name}", (loss_of_one / tokens_of_one).float(), sync_dist=True)
    mean = (loss / tokens).float()
    # Equal on all ranks already; sync_dist only tells Lightning so.
    module.log(f"{stage}/loss", mean, prog_bar=True, sync_dist=True)
    module.log(f"{stage}/perplexity", mean.exp(), sync_dist=True)


def explain_no_targets(module: LightningModule, stage: str, had_batches: bool) -> None:
    """For evaluations whose mean loss is 0 / 0; to be called on every rank.

    Args:
        module: What was evaluated.
        stage: "val" or "test".
        had_batches: Whether this rank took a batch.

    Raises:
        ValueError: Always, but in a sanity check, where it only warns.
    """
    if had_batches:
        problem = (
            f"No token of any rank had a target, so that there is no {stage}/loss: every label after the first of "
            f"its sequence is {IGNORE} in all {stage} batches of this evaluation. Look at what makes the labels "
            "(targets cut off by the sequence length, or a prompt template that masks every token?), or raise "
            f"limit_{stage}_batches."
        )
    else:
        problem = (
            f"No rank took a {stage} batch, so that there is no {stage}/loss: all ranks stop with the first whose "
            f"data ends, and a loader gave nothing. Give every rank at least one batch (shares of equal size, more "
            f"data or fewer data ranks), or leave the evaluation out with limit_{stage}_batches=0."
        )
    if not module.trainer.sanity_checking:
        raise ValueError(problem)
    rank_zero_warn(f"In the sanity check: {problem} An evaluation in which that is so raises an error.")
