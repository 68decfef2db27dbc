"""What a loss is divided by: the one place that knows.

FSDP groups *sum* gradients over ranks, and Lightning divides every loss by ``accumulate_grad_batches``. A step is to
follow a mean all the same, so a loss that is

- a mean, as Lightning has losses, is divided by the ranks as it enters backward (`into_backward`);
- a sum, of a module that is a `SumsLosses`, loses Lightning's division there, and gradients are divided by the terms of
  the whole window when that ends (`at_step`);
- a sum whose terms are known before its backward becomes a mean there and then (`mean_of_sum`), without a pass over
  the gradients.

Losses of routers, of which the ranks' parts sum to the whole, are added behind that (`with_router_losses`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_ep.layout import ParallelLayout
from lightning_ep.routing.steer import Steering


@runtime_checkable
class SumsLosses(Protocol):
    """A LightningModule whose ``training_step`` returns sums of terms, of which a step follows the mean."""

    @property
    def gradient_denominator(self) -> Callable[[], Tensor] | None:
        """A method that gives the number of terms since the last step, of all ranks (tp and cp peers included).

        It is called once per optimizer step, on every rank, before hooks, clipping and the step see the gradients, and
        returns a 0-dim tensor on their device, the same on every rank. A module that sums in some steps only makes it a
        property, which is None while its losses are means.
        """


def denominator_of(module: LightningModule) -> Callable[[], Tensor] | None:
    """What gives the terms of the losses that ``module`` returns now, or None if they are means."""
    return module.gradient_denominator if isinstance(module, SumsLosses) else None


def into_backward(loss: Tensor, module: LightningModule, layout: ParallelLayout, accumulated: int) -> Tensor:
    """A loss as it enters backward.

    Args:
        loss: As Lightning gives it, divided by ``accumulated``.
        module: What returned it.
        layout: The layout; tensor-parallel peers add parts of one sum and count as ranks.
        accumulated: ``accumulate_grad_batches``.
    """
    return loss / layout.loss_world_size if denominator_of(module) is None else loss * accumulated


def with_router_losses(loss: Tensor, module: LightningModule, steerings: list[Steering], accumulated: int) -> Tensor:
    """A loss that enters backward, with this rank's part of the losses of routers; every rank must call it.

    In a window of sums they count as often as the terms of the micro-batch, so that its last division makes a mean of
    both; ``module`` says how many it has (``batch_terms``).
    """
    for steering in steerings:
        if denominator_of(module) is None:
            part = steering.losses(1.0, loss.device, mean=True)
            part = None if part is None else part / accumulated
        else:
            part = steering.losses(_terms_of_batch(module, steering), loss.device, mean=False)
        if part is not None:
            loss = loss + part.to(loss.dtype)
    return loss


def _terms_of_batch(module: LightningModule, steering: Steering) -> Tensor | float:
    terms = getattr(module, "batch_terms", None)
    if terms is None and steering.has_losses:
        raise ValueError(
            f"{type(module).__name__} sums losses over a window (`gradient_denominator`), in which those of routers "
            "count by the terms of a micro-batch: let `training_step` keep this rank's number of them, a 0-dim tensor, "
            "as `self.batch_terms`."
        )
    return 0.0 if terms is None else terms


def at_step(module: LightningModule) -> Tensor | None:
    """The factor of the gradients of a window that ends, 0-dim; None if they are right. To be called once per step."""
    denominator = denominator_of(module)
    return None if denominator is None else 1 / denominator()


def mean_of_sum(loss: Tensor, terms: Tensor, layout: ParallelLayout) -> Tensor:
    """A sum over this rank's terms as a loss whose mean over the ranks is that over all ``terms`` (0-dim)."""
    return loss * (layout.loss_world_size / terms)
