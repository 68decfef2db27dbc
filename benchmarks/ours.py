"""Runs a cell through Lightning's Trainer with ExpertParallelStrategy and CausalLM, as a user does.

With names that users know, and no others: ``lightning_ep`` may be that of an older commit.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from typing_extensions import override

import lightning_ep
from benchmarks.cells import LEFT_OUT, Cell
from benchmarks.measure import Meter
from benchmarks.records import ROOT
from benchmarks.workload import batches, fill_parameters, leave_out_exchanges, max_over_mean
from lightning_ep import AdamW, CausalLM, ExpertParallelStrategy


class FastStart(ExpertParallelStrategy):
    """Draws random weights on the device: the strategy's layout-independent streams on the CPU take minutes."""

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        fill_parameters(self.lightning_module, self.root_device)
        super().setup(trainer)  # finds only buffers left to fill


def quiet_trainer(strategy: ExpertParallelStrategy, device: torch.device | str, ranks: int, **settings: Any) -> Trainer:
    """A Trainer that clips at norm 1, and neither logs, saves nor shows anything."""
    return Trainer(
        strategy=strategy, accelerator=torch.device(device).type, devices=ranks, gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, **settings,
    )  # fmt: skip


class _Steps(Callback):
    """Tells the meter."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if importlib.util.find_spec("lightning_ep.routing") is None:
            return  # older commits, of which it stays unknown
        from lightning_ep.routing import RoutingCounts

        counts = RoutingCounts(pl_module)

        def read() -> float:
            counts.remove()
            return max_over_mean(counts.take())

        self._meter.read_popularity = read

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if (batch[-1] + 1) % trainer.accumulate_grad_batches == 0:
            self._meter.step_ended(lambda: trainer.callback_metrics["train/loss"])


def _arguments(cell: Cell) -> dict[str, Any]:
    """Of CausalLM, as far as the cell asks for them: older commits do not have all."""
    arguments: dict[str, Any] = {}
    if cell.lora is not None:
        where, _, rank = cell.lora.partition(",")
        arguments["adapter"] = lightning_ep.LoRA(r=int(rank), lora_alpha=2 * int(rank), experts=where == "all")
    if cell.balanced:
        from lightning_ep.routing import ForcedBalance

        arguments["router"] = ForcedBalance()
    return arguments


def run(cell: Cell, meter: Meter) -> None:
    """Trains ``meter.num_steps`` steps; raises RuntimeError if the code that was imported is not of the cell's tree."""
    expected, found = Path(cell.tree or ROOT).resolve(), Path(lightning_ep.__file__).resolve().parents[1]
    if found != expected:
        raise RuntimeError(f"lightning_ep is that of {found}, not of {expected}.")
    if cell.exchange == LEFT_OUT:
        leave_out_exchanges()
    callbacks: list[Callback] = [_Steps(meter)]
    if cell.monitor:
        from lightning_ep.callbacks import ExpertLoadMonitor

        callbacks.insert(0, ExpertLoadMonitor())
    settings: dict[str, Any] = {**cell.layout, "activation_checkpointing": cell.recompute, "compile": cell.compile}
    trainer = quiet_trainer(
        FastStart(**settings), meter.device, cell.ranks, precision="bf16-true" if cell.bf16_weights else "bf16-mixed",
        max_steps=meter.num_steps, callbacks=callbacks, accumulate_grad_batches=cell.accumulate,
        log_every_n_steps=cell.monitor or None,
    )  # fmt: skip
    rounds = cell.bf16_weights or cell.bf16_moments
    rounding: dict[str, Any] = {"stochastic_rounding": True} if rounds else {}  # older commits have none
    optimizer = functools.partial(AdamW, lr=1e-5, **rounding)
    module = CausalLM(cell.config(), pretrained=False, optimizer=optimizer, **_arguments(cell))
    data: Any = list(batches(cell, meter.num_steps * cell.accumulate))
    trainer.fit(module, DataLoader(data, batch_size=None, pin_memory=meter.device.type == "cuda"))
