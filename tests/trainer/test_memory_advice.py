"""An out-of-memory error says which change of the recipe is estimated to fit."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_ep import ExpertParallelStrategy
from lightning_ep.planner import QWEN3_30B_A3B, Case, peak_gib
from lightning_ep.planner.devices import GPUS
from lightning_ep.trainer import memory_advice
from lightning_ep.trainer.memory_advice import what_fits
from tests.tiny import TinyModule, loader

NODE = Case(QWEN3_30B_A3B, 48, 4, 4096, 8, ep=8)


def test_recompute_comes_before_smaller_batches() -> None:
    said = what_fits(NODE, 75.0)
    full = dataclasses.replace(NODE, recompute="full")
    assert f"estimates {peak_gib(NODE, 75.0):.1f} GiB per GPU, of 75.0" in said
    assert "for 4 x 4,096 tokens with activation_checkpointing: none" in said
    assert f"{peak_gib(full, 75.0):.1f} GiB are enough with strategy.init_args.activation_checkpointing: full" in said
    assert "activation_checkpointing: selective" in what_fits(NODE, 112.0)


def test_then_batches_are_halved_with_as_many_tokens_per_step() -> None:
    long = dataclasses.replace(NODE, batch=8, sequence=8192, recompute="full")
    wanted = r"GiB are enough with data.init_args.batch_size: (\d), trainer.accumulate_grad_batches: (\d)\."
    found = re.search(wanted, what_fits(long, 75.0))
    assert found is not None
    batch, accumulate = int(found[1]), int(found[2])
    assert batch * accumulate == 8
    assert peak_gib(dataclasses.replace(long, batch=batch, accumulate=accumulate), 75.0) <= 0.95 * 75
    assert peak_gib(dataclasses.replace(long, batch=2 * batch, accumulate=accumulate // 2), 75.0) > 0.95 * 75
    both = what_fits(dataclasses.replace(long, recompute="none"), 75.0)
    assert f"activation_checkpointing: full, data.init_args.batch_size: {batch}, trainer.accumulate" in both


def test_where_nothing_helps_plan_is_named() -> None:
    alone = dataclasses.replace(NODE, ranks=1, ep=1, batch=1, recompute="full")
    assert "Neither recompute nor smaller batches would fit: `lightning-ep plan`" in what_fits(alone, 75.0)


class _Full(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "precision", "notes"),
    [(torch.OutOfMemoryError("full"), "bf16-mixed", 1), (ValueError("wrong"), "bf16-mixed", 0),
     (torch.OutOfMemoryError("full"), "32-true", 0)],
)  # fmt: skip
def test_the_error_of_a_run_has_the_note(
    error: Exception, precision: Any, notes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_advice, "gpu_of_process", lambda: dataclasses.replace(GPUS["H100"], memory_gib=4.001))
    module = _Full()
    module.error = error
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=1, precision=precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        strategy=ExpertParallelStrategy(activation_checkpointing="selective"),
    )  # fmt: skip
    with pytest.raises(type(error)) as raised:
        trainer.fit(module, loader())
    found = getattr(raised.value, "__notes__", [])
    assert len(found) == notes
    assert all("tokens with activation_checkpointing: selective" in note for note in found)
