"""Steps whose gradient norm is not finite: left out on all ranks alike, counted, and not for ever."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_ep.trainer.clipping import global_grad_norm


class NonfiniteGuard:
    """Decides by the norm of all ranks whether an optimizer may step.

    Args:
        limit: Steps of one optimizer that may be left out in a row. 0: all are taken, and no norm is asked for.

    Attributes:
        skipped: Steps that were left out since the guard was made.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self._in_a_row: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._norms: WeakKeyDictionary[Optimizer, Tensor] = WeakKeyDictionary()

    def check(self) -> None:
        """Raises ValueError unless the limit is a number of steps."""
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 0:
            raise ValueError(
                f"skip_nonfinite_steps={self.limit!r} is no number of steps: pass how many steps in a row may be left "
                "out when their gradient norm is not finite, or 0 to take every step."
            )

    def note(self, optimizer: Optimizer | LightningOptimizer, norm: Tensor) -> None:
        """Takes the norm of the gradients of an optimizer's coming step, where somebody has computed it already."""
        if self.limit:
            self._norms[optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer] = norm

    def note_norm_of(self, optimizer: Optimizer | LightningOptimizer, params: Iterable[Tensor]) -> None:
        """Takes the norm of gradients that are about to be changed in a way that hides an infinite one."""
        if self.limit:
            self.note(optimizer, global_grad_norm(params))

    def skips(self, optimizer: Optimizer, params: Iterable[Tensor], step: int) -> bool:
        """Whether the step that is due must be left out; every rank must call it, once per step.

        Args:
            optimizer: Whose step it is.
            params: Its parameters, with the gradients of the step.
            step: The number of the step, for messages.

        Raises:
            RuntimeError: On every rank, if as many steps as allowed have been left out in a row already.
        """
        norm = self._norms.pop(optimizer, None)
        if norm is None:
            norm = global_grad_norm(params)
        if bool(torch.isfinite(norm)):
            self._in_a_row.pop(optimizer, None)
            return False
        before = self._in_a_row.get(optimizer, 0)
        if before == self.limit:
            raise RuntimeError(
                f"The gradient norm of step {step} is {norm.item()}, after {before} steps in a row were left out for "
                f"the same reason (skip_nonfinite_steps={self.limit}). Go on from an earlier checkpoint, with a lower "
                "learning rate, with gradient_clip_val, or without the batches that cause it."
            )
        self._in_a_row[optimizer] = before + 1
        self.skipped += 1
        rank_zero_warn(
            f"Step {step} was left out: its gradient norm is {norm.item()} ({before + 1} in a row, at most "
            f"{self.limit}; {self.skipped} in all)."
        )
        return True
