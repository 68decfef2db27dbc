"""Tokens per second, and how much of the hardware they use, in the progress bar and the log."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_ep import planner
from lightning_ep import transformers_adapter as adapter
from lightning_ep.data.resumable_loader import data_ranks

_FROZEN = 0.01  # of the parameters: routers are fewer
_ASKED = "train_dataloader_next"  # the end of what Lightning's training loop calls it


class _Step(NamedTuple):
    tokens: int  # of this rank's batch
    flops: float  # of these
    seconds: float
    waited: float  # seconds of these in which the loader was asked for the batch


class _TimesLoader(Profiler):
    """Stands in for a Trainer's profiler, which is told when the loader is asked for a batch and when it has come."""

    def __init__(self, profiler: Profiler) -> None:
        super().__init__()
        self.profiler = profiler
        self._seconds = 0.0
        self._since = 0.0

    @override
    def start(self, action_name: str) -> None:
        self.profiler.start(action_name)
        if action_name.endswith(_ASKED):
            self._since = time.perf_counter()

    @override
    def stop(self, action_name: str) -> None:
        if action_name.endswith(_ASKED):
            self._seconds += time.perf_counter() - self._since
        self.profiler.stop(action_name)

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @override
    def summary(self) -> str:
        return self.profiler.summary()


class Throughput(Callback):
    """Logs training throughput, without communication.

    - ``tokens/s``, also in the progress bar: distinct tokens of all data ranks per second of wall-clock time. Ranks
      that share a batch (tensor- and context-parallel peers) count it once. Padding counts.
    - ``tokens/s/device``: the same per process.
    - ``mfu``, on GPUs whose peak is known, in bf16: the FLOPs of the model (causal attention inside of documents,
      experts that a token goes to, backward as twice the forward; recompute does not count) as a share of the dense
      peak. Where there is none, a line says why.
    - ``data/wait``: share of the time in which the host waited for the loader. What GPUs lose by it is at most that.
    - ``memory/peak_gib``, on GPUs: this process's largest allocation so far, in GiB.

    Time includes waiting for data, and leaves out validation and the writing of checkpoints. All data ranks are taken
    to have batches like this one's, of ``batch["input_ids"].numel()`` tokens.

    Args:
        window: Number of batches to average over.
    """

    def __init__(self, window: int = 50) -> None:
        self.window = window
        self._steps: deque[_Step] = deque(maxlen=window)
        self._since: float | None = None
        self._loader: _TimesLoader | None = None
        self._peak: float | None = None
        self._flops: Callable[[int], float] = _no_flops

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps.clear()
        self._since = None
        self._peak, self._flops = None, _no_flops
        self._loader = _TimesLoader(trainer.profiler)  # type: ignore[attr-defined]
        trainer.profiler = self._loader  # type: ignore[attr-defined]
        try:
            self._peak = _peak(pl_module.device)
            if self._peak is not None:
                self._flops = _flops_per_token(trainer, pl_module)
        except ValueError as error:
            self._peak = None
            rank_zero_info(f"Throughput logs no mfu: {error}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._loader is not None:
            trainer.profiler = self._loader.profiler  # type: ignore[attr-defined]
            self._loader = None

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
            self._loader_seconds()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self._since is None:
            return  # a checkpoint was saved since the step began, by a callback before this one
        tokens = batch["input_ids"].numel()
        flops = tokens * self._flops_of(batch) if self._peak is not None else 0.0
        self._steps.append(_Step(tokens, flops, now - self._since, self._loader_seconds()))
        self._since = now
        for name, number in self._numbers(trainer, pl_module.device).items():
            # On the CPU: of a number Lightning would make a tensor on the GPU, for which the host waits.
            pl_module.log(name, torch.tensor(number), prog_bar=name == "tokens/s")

    def _loader_seconds(self) -> float:
        return 0.0 if self._loader is None else self._loader.take()

    def _numbers(self, trainer: Trainer, device: torch.device) -> dict[str, float]:
        _, data_world_size = data_ranks(trainer)
        tokens, flops, seconds, waited = (sum(values) for values in zip(*self._steps, strict=True))
        rate = tokens * data_world_size / seconds
        numbers = {"tokens/s": rate, "tokens/s/device": rate / trainer.world_size, "data/wait": waited / seconds}
        if self._peak is not None:
            numbers["mfu"] = flops * data_world_size / trainer.world_size / seconds / self._peak
        if device.type == "cuda":
            numbers["memory/peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        return numbers

    def _flops_of(self, batch: Any) -> float:
        """FLOPs of a token of a batch on average, whose documents the host has read on its way to the device."""
        lengths = adapter.document_lengths(batch)
        if lengths is None:
            return self._flops(batch["input_ids"].shape[-1])
        return sum(length * self._flops(length) for length in lengths) / sum(lengths)


def _no_flops(length: int) -> float:
    return 0.0


def _peak(device: torch.device) -> float | None:
    """FLOP/s of a GPU in dense bf16, None for a CPU; raises ValueError for a GPU of which they are not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if (peak := planner.dense_peak(name)) is None:
        raise ValueError(f"the peak of {name} is not known.")
    return peak


def _flops_per_token(trainer: Trainer, module: LightningModule) -> Callable[[int], float]:
    """Gives the training FLOPs of a token in a document of so many tokens.

    Raises:
        ValueError: If they are not known.
    """
    if not str(trainer.precision).startswith("bf16"):
        raise ValueError(f"the peaks that are known are those of bf16, and precision is {trainer.precision}.")
    models = list(adapter.pretrained_models(module).values())
    if len(models) != 1:
        raise ValueError(f"the module has {len(models)} transformers models, and the FLOPs of one are counted.")
    (model,) = models
    total = sum(param.numel() for param in module.parameters())
    frozen = sum(param.numel() for param in module.parameters() if not param.requires_grad)
    if frozen > _FROZEN * total:
        raise ValueError(f"{frozen / total:.0%} of the parameters are frozen, whose gradients are not computed.")
    widths, layers = planner.read_widths(model.config.to_dict())
    return functools.cache(lambda length: planner.flops_per_token(widths, layers, length))
