"""Runs a cell through Lightning's Trainer with ExpertParallelStrategy and CausalLM, as a user does."""

from __future__ import annotations

import functools
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.cells import Cell
from benchmarks.measure import Meter, batches, fill_parameters
from benchmarks.router import prepare_transformers_routers
from lightning_ep import AdamW, CausalLM, ExpertParallelStrategy


class _Module(CausalLM):
    """CausalLM that keeps its last loss, with routers of the cell's popularity."""

    def __init__(self, cell: Cell, meter: Meter, **kwargs: Any) -> None:
        super().__init__(cell.config(), pretrained=False, **kwargs)
        self._cell, self._meter = cell, meter
        self.last_loss: Tensor | None = None

    @override
    def configure_model(self) -> None:
        super().configure_model()
        self._meter.read_popularity = prepare_transformers_routers(self.model, self._cell, self._meter.device).read

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.last_loss = self._train_loss
        return loss


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
        assert isinstance(pl_module, _Module)
        assert pl_module.last_loss is not None
        self._meter.step_ended(pl_module.last_loss)


def run(cell: Cell, meter: Meter) -> None:
    """Trains ``meter.num_steps`` steps."""
    cuda = meter.device.type == "cuda"
    module = _Module(cell, meter, optimizer=functools.partial(AdamW, lr=1e-5))
    trainer = Trainer(
        strategy=_FastStart(
            ep=cell.ep,
            cp=cell.cp,
            tp=cell.tp,
            activation_checkpointing=cell.recompute,  # type: ignore[arg-type]
            compile=cell.compile,
        ),
        accelerator="cuda" if cuda else "cpu",
        devices=cell.processes,
        num_nodes=cell.ranks // cell.processes,
        precision=cell.precision,  # type: ignore[arg-type]
        gradient_clip_val=1.0,
        max_steps=meter.num_steps,
        callbacks=[_Steps(meter)],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data: Any = list(batches(cell, meter.num_steps))
    trainer.fit(module, DataLoader(data, batch_size=None, pin_memory=cuda))
