"""Runs a cell through Lightning's Trainer with ExpertParallelStrategy and CausalLM, as a user does.

With names that users know, and no others: ``lightning_ep`` may be that of an older commit.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from typing_extensions import override

import lightning_ep
from benchmarks.cells import Cell
from benchmarks.measure import Meter
from benchmarks.records import ROOT
from benchmarks.workload import Popularity, balance, batches, fill_parameters
from lightning_ep import AdamW, CausalLM, ExpertParallelStrategy


class _Module(CausalLM):
    """CausalLM whose routers are counted."""

    def __init__(self, cell: Cell, meter: Meter, **kwargs: Any) -> None:
        super().__init__(cell.config(), pretrained=False, **kwargs)
        self._meter, self._balanced = meter, cell.balanced

    @override
    def configure_model(self) -> None:
        super().configure_model()
        if self._balanced:
            balance(self.model)
        self._meter.read_popularity = Popularity(self.model).read


class _FastStart(ExpertParallelStrategy):
    """Draws random weights on the device: the strategy's layout-independent streams on the CPU take minutes."""

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        fill_parameters(self.lightning_module, self.root_device)
        super().setup(trainer)  # finds only buffers left to fill


class _Steps(Callback):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._meter.step_ended(lambda: trainer.callback_metrics["train/loss"])


def _adapter(cell: Cell) -> dict[str, Any]:
    """The argument of CausalLM, which older commits do not have."""
    if cell.lora is None:
        return {}
    where, _, rank = cell.lora.partition(",")
    return {"adapter": lightning_ep.LoRA(r=int(rank), lora_alpha=2 * int(rank), experts=where == "all")}


def run(cell: Cell, meter: Meter) -> None:
    """Trains ``meter.num_steps`` steps; raises RuntimeError if the code that was imported is not of the cell's tree."""
    expected, found = Path(cell.tree or ROOT).resolve(), Path(lightning_ep.__file__).resolve().parents[1]
    if found != expected:
        raise RuntimeError(f"lightning_ep is that of {found}, not of {expected}.")
    cuda = meter.device.type == "cuda"
    settings: dict[str, Any] = {**cell.layout, "activation_checkpointing": cell.recompute, "compile": cell.compile}
    trainer = Trainer(
        strategy=_FastStart(**settings), accelerator="cuda" if cuda else "cpu", devices=cell.ranks,
        precision="bf16-true" if cell.bf16_weights else "bf16-mixed", gradient_clip_val=1.0,
        max_steps=meter.num_steps, callbacks=[_Steps(meter)],
        use_distributed_sampler=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    rounding: dict[str, Any] = (
        {"stochastic_rounding": True} if cell.bf16_weights else {}
    )  # which older commits do not have
    module = _Module(cell, meter, optimizer=functools.partial(AdamW, lr=1e-5, **rounding), **_adapter(cell))
    data: Any = list(batches(cell, meter.num_steps))
    trainer.fit(module, DataLoader(data, batch_size=None, pin_memory=cuda))
