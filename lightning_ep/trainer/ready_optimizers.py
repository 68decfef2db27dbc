"""What optimizers are told before their first step, and which of them cannot work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_ep.checkpoint.optimizers import clean
from lightning_ep.trainer.adamw import AdamW
from lightning_ep.trainer.refusals import refuse_optimizers


def prepare_optimizers(optimizers: list[Optimizer], module: LightningModule, seed: Callable[[], int]) -> None:
    """Gives optimizers that round stochastically names and a seed; warns of weights in bf16 that nobody rounds so.

    Args:
        optimizers: Those of the run that is about to start.
        module: Its module, whose parameters are shards by now.
        seed: Gives the same on every rank, if all of them ask.

    Raises:
        ValueError: For optimizers that cannot work on shards, and to round bf16 weights stochastically where gradients
            would be accumulated in bf16.
    """
    refuse_optimizers(optimizers)
    for optimizer in optimizers:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        in_bf16 = [param for param in params if param.dtype == torch.bfloat16]
        if isinstance(optimizer, AdamW) and optimizer.rounds:
            if str(module.trainer.precision) == "bf16-true":  # elsewhere what is bf16 is frozen
                _refuse_accumulation(module.trainer)
            optimizer.name_parameters({clean(name): param for name, param in module.named_parameters()}, seed())
        elif any(param.requires_grad for param in in_bf16):
            rank_zero_warn(
                f"{type(optimizer).__name__} rounds bf16 weights to the nearest: an update below 1/512 of a weight, "
                "which most are at learning rates of fine-tuning, changes nothing. Pass "
                "lightning_ep.AdamW(stochastic_rounding=True), or train with precision='bf16-mixed', whose weights "
                "are fp32."
            )


def _refuse_accumulation(trainer: Trainer) -> None:
    schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    scheduled = max((max(c.scheduling.values()) for c in schedulers), default=1)
    if (batches := max(trainer.accumulate_grad_batches, scheduled)) > 1:
        raise ValueError(
            f"AdamW(stochastic_rounding=True) cannot step with accumulate_grad_batches={batches}: gradients are bf16, "
            "where a sum of many loses what is added last, and fp32 sums would take the memory that bf16 saves. Use "
            "larger batches (with activation_checkpointing='full' they cost least), or precision='bf16-mixed'."
        )
