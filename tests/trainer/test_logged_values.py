"""What a module logs with ``sync_dist=True`` is the mean of the ranks, wherever the value is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_ep import ExpertParallelStrategy
from tests.ranks import run_ranks
from tests.tiny import TinyModule, loader, quiet


class _LogsOnTheCPU(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("mine", torch.tensor(float(os.environ["RANK"])), sync_dist=True)
        self.log("whole", torch.tensor(int(os.environ["RANK"])), sync_dist=True)
        return super().training_step(batch, batch_idx)


def _logged(root: Path) -> list[float]:
    trainer = quiet(root, strategy=ExpertParallelStrategy(ep=2), max_steps=1)
    trainer.fit(_LogsOnTheCPU(), loader(8))
    return [trainer.callback_metrics[name].item() for name in ("mine", "whole")]


def test_values_on_the_cpu_are_averaged(tmp_path: Path) -> None:
    assert run_ranks(2, _logged, tmp_path, init_process_group=False) == [[0.5, 0.5], [0.5, 0.5]]


def test_values_on_the_cpu_travel_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def reduce(self: Any, tensor: Tensor, *_: Any) -> Tensor:
        seen.append(tensor.device.type)
        return torch.ones_like(tensor, device="cpu")

    monkeypatch.setattr(ModelParallelStrategy, "reduce", reduce)
    monkeypatch.setattr(ExpertParallelStrategy, "root_device", torch.device("meta"))
    assert ExpertParallelStrategy().reduce(torch.zeros(2)).tolist() == [1, 1]
    assert seen == ["meta"]
