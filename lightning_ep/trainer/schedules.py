"""Learning rates over the steps of a run, whose number a recipe need not say."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_ep.checkpoint.loop_state import batches_done

_SHAPES = ("cosine", "linear", "wsd", "constant")


class Schedule(LRScheduler):
    """Warm-up, then a decay that ends with the last step, or none.

    The learning rate grows linearly over the steps of warm-up, of which the last has the optimizer's. It falls to
    ``end`` times that, which the step after the last one would have. Shapes are ``cosine`` (half a
    cosine), ``linear``, ``wsd`` (warm-up, stable, decay: linear over the last steps only; Hu et al., 2024, "MiniCPM")
    and ``constant``.

    Under `ExpertParallelStrategy` the number of steps is that of the run, whether ``max_epochs`` or ``max_steps`` ends
    it, and a run that is resumed with another number ends with that. It steps once per optimizer step.

    Args:
        optimizer: The optimizer.
        shape: cosine, linear, wsd or constant.
        warmup: Steps of warm-up: below 1 a share of all, otherwise their number.
        decay: Steps over which ``wsd`` decays, given likewise.
        end: Share of the learning rate at which the decay ends.
        total_steps: Steps of the run. Default: ExpertParallelStrategy says so when training starts.

    Raises:
        ValueError: If an argument is out of its range, or the run has no end and the learning rate is to fall.
        RuntimeError: If it is stepped and nobody has said how many steps there are.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        shape: Literal["cosine", "linear", "wsd", "constant"] = "cosine",
        warmup: float = 0.0,
        decay: float = 0.1,
        end: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        if shape not in _SHAPES:
            raise ValueError(f"shape={shape!r} is none of {', '.join(_SHAPES)}.")
        for name, value in (("warmup", warmup), ("decay", decay)):
            if value < 0 or (value > 1 and value != int(value)):
                raise ValueError(f"{name}={value} must be a share of the steps below 1, or a whole number of steps.")
        if not 0 <= end <= 1:
            raise ValueError(f"end={end} must lie between 0 and 1: it is a share of the learning rate.")
        self.shape, self.warmup, self.decay, self.end = shape, warmup, decay, end
        self.total_steps: float | None = None
        super().__init__(optimizer)
        if total_steps is not None:
            self.set_total_steps(total_steps)

    def set_total_steps(self, total_steps: float) -> None:
        """Says how many steps the run has, at any time; infinity if it has no end.

        Raises:
            ValueError: If it has none and the learning rate is to fall.
        """
        if math.isinf(total_steps) and self.shape != "constant":
            raise ValueError(
                f"shape={self.shape!r} ends with the run. Say when: max_steps or max_epochs of the Trainer."
            )
        self.total_steps = total_steps
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=False):
            _set_lr(group, lr)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def factor(self, step: int) -> float:
        """Share of the learning rate that a step has, counted from 0."""
        assert self.total_steps is not None
        warmup = _steps(self.warmup, self.total_steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.shape == "constant":
            return 1.0
        length = self.total_steps - max(warmup - 1, 0)
        if self.shape == "wsd":
            length = min(length, _steps(self.decay, self.total_steps))
        gone = min(max(0.0, 1 - (self.total_steps - step) / max(1, length)), 1.0)
        left = (1 + math.cos(math.pi * gone)) / 2 if self.shape == "cosine" else 1 - gone
        return self.end + (1 - self.end) * left

    @override
    def get_lr(self) -> list[Any]:
        if self.total_steps is None:
            if self.last_epoch > 0:
                raise RuntimeError(
                    "Schedule does not know how many steps there are. ExpertParallelStrategy tells it; elsewhere pass "
                    "total_steps=self.trainer.estimated_stepping_batches."
                )
            return list(self.base_lrs)
        factor = self.factor(self.last_epoch)
        return [lr * factor for lr in self.base_lrs]

    @override
    def state_dict(self) -> dict[str, Any]:
        """The position and the learning rates; what the schedule looks like is this run's, also after a resume."""
        mine = ("shape", "warmup", "decay", "end", "total_steps")
        return {key: value for key, value in super().state_dict().items() if key not in mine}


def tell_total_steps(trainer: Trainer) -> None:
    """Says to schedules how many optimizer steps there will have been at the end. Call it right before the first epoch.

    A position inside an epoch counts as this run cuts the epoch into batches, which another number of data ranks does
    otherwise than the run that it resumes.
    """
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, Schedule):
            config.scheduler.set_total_steps(total_steps(trainer))


def total_steps(trainer: Trainer) -> float:
    """Optimizer steps at the end of a fit whose loaders are set up; infinity if nothing bounds them."""
    most = math.inf if trainer.max_steps == -1 else trainer.max_steps
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs is None or epochs == -1 or math.isinf(batches) or not batches:
        return most
    done = batches_done(trainer) % batches  # an epoch that is finished counts among the epochs
    # Windows begin anew in every epoch, and its last may be a short one.
    left = sum(math.ceil(batches / _window(trainer, epoch)) for epoch in range(trainer.current_epoch, epochs))
    return min(trainer.global_step + left - done // _window(trainer, trainer.current_epoch), most)


def _window(trainer: Trainer, epoch: int) -> int:
    """Batches per optimizer step in an epoch."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def _steps(value: float, total: float) -> int:
    """A number of steps that may be given as a share."""
    if value < 1:
        return 0 if math.isinf(total) else round(value * total)
    return int(value)


def _set_lr(group: dict[str, Any], lr: Any) -> None:
    if hasattr(group["lr"], "fill_"):  # kept as a tensor
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
