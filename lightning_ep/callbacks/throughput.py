"""Tokens per second, in the progress bar and the log."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_ep.data.resumable_loader import data_ranks


class Throughput(Callback):
    """Logs training throughput, without communication.

    - ``tokens/s``, also in the progress bar: distinct tokens of all data ranks per second of wall-clock time. Ranks
      that share a batch (tensor- and context-parallel peers) count it once. Padding counts.
    - ``tokens/s/device``: the same per process.
    - ``memory/peak_gib``, on GPUs: this process's largest allocation so far, in GiB.

    Time includes waiting for data, and leaves out validation and the writing of checkpoints. All data ranks are taken
    to have batches of the size of this one's, ``batch["input_ids"].numel()``.

    Args:
        window: Number of batches to average over.
    """

    def __init__(self, window: int = 50) -> None:
        self.window = window
        self._steps: deque[tuple[int, float]] = deque(maxlen=window)  # (tokens, seconds)
        self._since: float | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps.clear()
        self._since = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = None

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._since = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # A step lasts from the end of the one before, unless something else came between.
        if self._since is None:
            self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._since is None:
            return  # a checkpoint was saved since the step began, by a callback before this one
        _, data_world_size = data_ranks(trainer)
        self._steps.append((batch["input_ids"].numel() * data_world_size, now - self._since))
        self._since = now
        rate = sum(tokens for tokens, _ in self._steps) / sum(seconds for _, seconds in self._steps)
        numbers = {"tokens/s": rate, "tokens/s/device": rate / trainer.world_size}
        if pl_module.device.type == "cuda":
            numbers["memory/peak_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        for name, number in numbers.items():
            # On the CPU: of a number Lightning would make a tensor on the GPU, for which the host waits.
            pl_module.log(name, torch.tensor(number), prog_bar=name == "tokens/s")
