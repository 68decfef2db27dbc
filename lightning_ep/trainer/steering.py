"""What steers training is the same on all ranks: monitored metrics, clocks, numbers in the optimizers' groups."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ep.distributed.agreement import from_all_ranks
from lightning_ep.distributed.decisions import by_rank, check_shared, unshared
from lightning_ep.process_groups import hosts

Settings = tuple[int, list[list[Mapping[str, Any]]]]
"""Optimizer steps that were taken, and the groups' settings of every optimizer."""


class CheckMonitored(Callback):
    """Compares the metrics by which EarlyStopping and ReduceLROnPlateau decide, just before they do.

    Validations at intervals of time begin by the clock of rank 0.

    ModelCheckpoint's are compared in `checkpoint/model_checkpoint.py`. The sanity check shows all of them before the
    training begins.
    """

    def __init__(self) -> None:
        self._changed: list[Any] = []

    def watch(self, trainer: Trainer) -> None:
        """Takes part in the run that is about to start."""
        if self not in trainer.callbacks:  # type: ignore[attr-defined]
            trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]
        stops = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
        for callback in stops:
            callback._run_early_stopping_check = _checked(callback)  # type: ignore[method-assign]
        loop = trainer.fit_loop.epoch_loop
        self._changed = [*stops, loop]

        def monitor_value(key: str) -> Any:
            _check(trainer, [key])
            return type(loop)._get_monitor_value(loop, key)

        loop._get_monitor_value = monitor_value  # type: ignore[method-assign]
        if not hasattr(trainer, "val_check_interval"):  # it is a time, and no number of batches

            def validates(data_fetcher: Any) -> bool:
                # Lightning asks each rank's clock: some would begin a validation and others the next step.
                # Asked over the hosts: over the GPUs it would wait for the step.
                answer = torch.tensor(type(loop)._should_check_val_fx(loop, data_fetcher), dtype=torch.uint8)
                dist.broadcast(answer, src=0, group=hosts())
                return bool(answer)

            loop._should_check_val_fx = validates  # type: ignore[method-assign]

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            _check(trainer, monitored(trainer))

    def release(self) -> None:
        """Leaves callbacks and loop as they were."""
        for changed in self._changed:
            for name in ("_run_early_stopping_check", "_get_monitor_value", "_should_check_val_fx"):
                vars(changed).pop(name, None)
        self._changed = []


def _checked(callback: EarlyStopping) -> Any:
    def run(trainer: Trainer) -> None:
        _check(trainer, [callback.monitor])
        type(callback)._run_early_stopping_check(callback, trainer)

    return run


def _check(trainer: Trainer, names: list[str]) -> None:
    """Sends these only: a scheduler may ask in every step, and a run may log hundreds."""
    metrics = trainer.callback_metrics
    check_shared({name: metrics[name] for name in names if name in metrics}, names)


def monitored(trainer: Trainer) -> list[str]:
    """Names of the metrics by which callbacks and schedulers of a fit decide."""
    callbacks = [getattr(callback, "monitor", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    schedulers = [config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    return list(dict.fromkeys(name for name in callbacks + schedulers if isinstance(name, str)))


def settings(trainer: Trainer) -> Settings:
    """What is the same on all ranks after a batch: the number of steps, and every group of every optimizer.

    Read on the host, so that a step need not wait: settings that are tensors on a GPU are left out.
    """
    return trainer.global_step, [_settings(optimizer) for optimizer in trainer.optimizers]


def fingerprint(settings: Settings) -> int:
    """A number, below 2**32, that differs where the settings do."""
    return zlib.crc32(repr(settings).encode())


def raise_difference(trainer: Trainer, compared: Settings, group: dist.ProcessGroup | None) -> None:
    """To be called on every rank when fingerprints differ: what differs, on which ranks, and why it may.

    Args:
        trainer: The trainer.
        compared: Of what this rank has given the fingerprint.
        group: The ranks.

    Raises:
        RuntimeError: Always, with the same text on every rank.
    """
    steps, everywhere = zip(*from_all_ranks(compared, group), strict=True)
    differences = []
    if len(set(steps)) > 1:
        differences.append(f"the number of optimizer steps is {by_rank(steps)}")
    for index, optimizer in enumerate(trainer.optimizers):
        sizes = [len(theirs[index]) for theirs in everywhere]
        if len(set(sizes)) > 1:
            differences.append(f"{type(optimizer).__name__} has {by_rank(f'{size} groups' for size in sizes)}")
            continue
        for number in range(sizes[0]):
            groups = [theirs[index][number] for theirs in everywhere]
            for name in dict.fromkeys(name for settings in groups for name in settings):
                values = [settings.get(name) for settings in groups]
                if any(value != values[0] for value in values):
                    differences.append(f"{name} of group {number} of {type(optimizer).__name__} is {by_rank(values)}")
    reason = unshared(trainer.callback_metrics, monitored(trainer), group) or (
        "What sets it must come from numbers that all ranks share: metrics logged with sync_dist=True, "
        "`strategy.reduce(...)`, `strategy.broadcast(...)`."
    )
    raise RuntimeError(
        f"Ranks train one model with different settings at step {max(steps)}: {'; '.join(differences)}. {reason}"
    )


def _settings(optimizer: Optimizer) -> list[Mapping[str, Any]]:
    """Of every group its settings as plain values, and the number of its parameters."""
    return [{name: _plain(value) for name, value in group.items()} for group in optimizer.param_groups]


def _plain(value: Any) -> Any:
    if isinstance(value, list):  # parameters, and their names where an optimizer was given them
        return len(value)
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 and value.device.type == "cpu" else None
    return value if isinstance(value, int | float | str | tuple | None | torch.dtype) else None
