"""BaseFinetuning tells parameters from one another by what they are, not by what they hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer


class KnownParameters:
    """While a run with a BaseFinetuning lasts, `filter_on_optimizer` compares parameters by identity.

    Lightning's compares their values, which raises for shards on several meshes and takes two norms that are all ones
    for one.
    """

    def __init__(self) -> None:
        self._theirs: Any = None

    def begin(self, trainer: Trainer) -> None:
        """Takes part in the run that is about to start."""
        if self._theirs is None and any(isinstance(c, BaseFinetuning) for c in trainer.callbacks):  # type: ignore[attr-defined]
            self._theirs = vars(BaseFinetuning)["filter_on_optimizer"]
            BaseFinetuning.filter_on_optimizer = staticmethod(_not_in)  # type: ignore[method-assign]

    def end(self) -> None:
        """Leaves Lightning's class as it was."""
        if self._theirs is not None:
            BaseFinetuning.filter_on_optimizer = self._theirs  # type: ignore[method-assign]
            self._theirs = None


def _not_in(optimizer: Optimizer, params: Iterable[Tensor]) -> list[Tensor]:
    there = {param for group in optimizer.param_groups for param in group["params"]}
    params = list(params)
    new = [param for param in params if param not in there]
    if len(new) < len(params):
        rank_zero_warn(
            f"{len(params) - len(new)} parameters are in a group of the optimizer already and stay there. To add them "
            "when they thaw, give the optimizer only those that train from the start: "
            "filter(lambda p: p.requires_grad, self.parameters())."
        )
    return new
