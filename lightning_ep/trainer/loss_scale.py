"""What a loss is divided by: the one place that knows.

FSDP groups *sum* gradients over ranks, and Lightning divides every loss by ``accumulate_grad_batches``. So the gradient
of a step is that of the sum over ranks and micro-batches of ``loss / accumulate_grad_batches``, scaled from here:

- every loss enters backward through `mean_over_ranks`, which makes the whole the mean that Lightning promises;
- what was a *sum* of terms is multiplied by `sum_to_mean`, which takes both divisions back and divides by the terms of
  the whole window instead: the loss itself where the terms are known before its backward, else the gradients.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_ep.layout import ParallelLayout


@runtime_checkable
class SumsLosses(Protocol):
    """A LightningModule whose ``training_step`` returns sums of terms, of which a step follows the mean."""

    def gradient_denominator(self) -> Tensor | None:
        """The number of terms, of all ranks (tp and cp peers included), since the last optimizer step.

        Called once per optimizer step, on every rank, before hooks, clipping and the step see the gradients.

        Returns:
            0-dim, on the gradients' device, the same on every rank; None if the losses of this step were means.
        """


def mean_over_ranks(loss: Tensor, layout: ParallelLayout) -> Tensor:
    """A loss as it enters backward; tensor-parallel peers add parts of one sum and count as ranks."""
    return loss / layout.loss_world_size


def sum_to_mean(terms: Tensor, layout: ParallelLayout, accumulated: int) -> Tensor:
    """The factor that makes a mean over ``terms`` of a sum that is scaled as a mean of losses.

    Args:
        terms: 0-dim, all terms of the window on all ranks.
        layout: The layout.
        accumulated: ``accumulate_grad_batches``, by which Lightning divides every loss.

    Returns:
        0-dim.
    """
    return layout.loss_world_size * accumulated / terms
