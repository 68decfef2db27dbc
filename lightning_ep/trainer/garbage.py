"""Python's collector of cyclic garbage, whose full passes hold up all ranks, each in a step of its own.

A model of 48 layers is half a million objects for it. Every eight steps or so it looked at all of them, in 0.2 s on a
CPU, and since ranks count their objects each for itself, the others waited every time. (LoRA at 48 layers on two H200:
two of eight steps took 1.4 s in place of 1.03, and since then none of ten.) What is there when a run has warmed up is
not looked at again until it ends; a full pass takes 2 ms then.
"""

from __future__ import annotations

import gc
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

_FROZEN = 10_000  # objects of somebody else's; Python 3.12 puts some hundreds aside by itself
_WARM_UP = 4  # optimizer steps: the first two compile and make state, two settle; in fewer nothing is to be gained


def spare_collections(trainer: Trainer) -> None:
    """Has the collector pass over what lives as long as the training that begins."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    spare = next((callback for callback in callbacks if isinstance(callback, _Spare)), None)
    if spare is None:
        callbacks.append(spare := _Spare())
    if gc.isenabled():  # else somebody else sees to it
        spare.step = trainer.global_step + _WARM_UP


class _Spare(Callback):
    """Stays with the Trainer for its next training.

    Attributes:
        step: Which optimizer step ends the warm-up; None before a training, and when it has been.
        has_frozen: Whether anything was frozen, in this training.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.has_frozen = False

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.step is not None and trainer.global_step >= self.step:
            self.step = None
            # What somebody else has frozen, an outer training or a program that forks, could not be kept apart.
            self.has_frozen = gc.get_freeze_count() < _FROZEN
            if self.has_frozen:
                gc.collect()  # garbage would be kept, too
                gc.freeze()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self.has_frozen:
            gc.unfreeze()  # the model may be garbage soon
        self.step, self.has_frozen = None, False
