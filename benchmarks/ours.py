"""Runs a cell through Lightning's Trainer with ExpertParallelStrategy and CausalLM, as a user does.

With names that users know, and no others: ``lightning_ep`` may be that of an older commit.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from typing_extensions import override

import lightning_ep
from benchmarks.cells import LEFT_OUT, Cell
from benchmarks.measure import Meter
from benchmarks.records import ROOT
from benchmarks.workload import Popularity, batches, fill_parameters, leave_out_exchanges, max_over_mean
from lightning_ep import AdamW, CausalLM, ExpertParallelStrategy


class _Module(CausalLM):
    """CausalLM whose routers are counted."""

    def __init__(self, cell: Cell, meter: Meter, **kwargs: Any) -> None:
        super().__init__(cell.config(), pretrained=False, **kwargs)
        self._meter = meter

    @override
    def on_fit_start(self) -> None:
        self._meter.read_popularity = _popularity(self)


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
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._meter.step_ended(lambda: trainer.callback_metrics["train/loss"])


def _adapter(cell: Cell) -> dict[str, Any]:
    """The argument of CausalLM, which older commits do not have."""
    if cell.lora is None:
        return {}
    where, _, rank = cell.lora.partition(",")
    return {"adapter": lightning_ep.LoRA(r=int(rank), lora_alpha=2 * int(rank), experts=where == "all")}


def _popularity(module: CausalLM) -> Callable[[], float]:
    """Counts what is chosen until it is read; older commits have nothing that counts in sharded models."""
    if importlib.util.find_spec("lightning_ep.routing") is None:
        return Popularity(module.model).read
    from lightning_ep.routing import RoutingCounts

    counts = RoutingCounts(module)

    def read() -> float:
        counts.remove()
        return max_over_mean(counts.take())

    return read


def _balanced(cell: Cell) -> dict[str, Any]:
    """The argument of CausalLM, which older commits do not have."""
    if not cell.balanced:
        return {}
    from lightning_ep.routing import ForcedBalance

    return {"router": ForcedBalance()}


def run(cell: Cell, meter: Meter) -> None:
    """Trains ``meter.num_steps`` steps; raises RuntimeError if the code that was imported is not of the cell's tree."""
    expected, found = Path(cell.tree or ROOT).resolve(), Path(lightning_ep.__file__).resolve().parents[1]
    if found != expected:
        raise RuntimeError(f"lightning_ep is that of {found}, not of {expected}.")
    cuda = meter.device.type == "cuda"
    if cell.exchange == LEFT_OUT:
        leave_out_exchanges()
    settings: dict[str, Any] = {**cell.layout, "activation_checkpointing": cell.recompute, "compile": cell.compile}
    trainer = Trainer(
        strategy=_FastStart(**settings), accelerator="cuda" if cuda else "cpu", devices=cell.ranks,
        precision="bf16-true" if cell.bf16_weights else "bf16-mixed", gradient_clip_val=1.0,
        max_steps=meter.num_steps, callbacks=[_Steps(meter)], accumulate_grad_batches=cell.accumulate,
        use_distributed_sampler=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    # Older commits do not have it.
    rounding: dict[str, Any] = {"stochastic_rounding": True} if cell.bf16_weights else {}
    optimizer = functools.partial(AdamW, lr=1e-5, **rounding)
    module = _Module(cell, meter, optimizer=optimizer, **_adapter(cell), **_balanced(cell))
    data: Any = list(batches(cell, meter.num_steps * cell.accumulate))
    trainer.fit(module, DataLoader(data, batch_size=None, pin_memory=cuda))
