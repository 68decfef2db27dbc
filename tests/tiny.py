"""A user's LightningModule around a tiny MoE, numbered samples, and a quiet Trainer: what the Trainer tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_ep import ExpertParallelStrategy
from tests.ranks import accelerator
from tests.reference import VOCAB, tiny_model

SMALL = {"num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2}


class Samples(Dataset):
    """``size`` sequences; sample ``first + i`` has the same tokens wherever it turns up."""

    def __init__(self, size: int, first: int = 0, length: int = 8) -> None:
        self.size, self.first, self.length = size, first, length

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self.size:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.first + index)
        ids = torch.randint(0, VOCAB, (self.length,), generator=generator)
        return {"id": torch.tensor(self.first + index), "input_ids": ids, "labels": ids}


class TinyModule(L.LightningModule):
    """What a user writes: every step, a metric, SGD; no word of parallelism."""

    def __init__(self, lr: float = 0.1, in_init: bool = False, **overrides: Any) -> None:
        super().__init__()
        self.lr = lr
        self.overrides = {**SMALL, **overrides}
        self.model: Any = tiny_model(**self.overrides) if in_init else None
        self.losses: list[float] = []
        self.seen: list[int] = []

    def configure_model(self) -> None:
        if self.model is None:
            self.model = tiny_model(**self.overrides)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.seen += batch["id"].tolist()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.loss(batch)
        return batch["id"]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def loader(size: int = 16, batch_size: int = 2, first: int = 0) -> DataLoader:
    return DataLoader(Samples(size, first), batch_size=batch_size)


@torch.no_grad()
def mean_loss(model: Any, size: int) -> float:
    """Mean loss of a plain model over the first ``size`` samples of `loader`, each for itself."""
    batches = DataLoader(Samples(size), batch_size=1)
    return sum(model(input_ids=b["input_ids"], labels=b["labels"]).loss.item() for b in batches) / size


def quiet(root: Path, **overrides: Any) -> L.Trainer:
    """A Trainer over all ranks that writes under ``root`` only what it is asked to."""
    overrides.setdefault("strategy", ExpertParallelStrategy(ep=2))
    arguments: dict[str, Any] = {
        # In the process of the tests itself NCCL would start for each Trainer anew, and crashes at the second.
        "accelerator": accelerator() if "LOCAL_RANK" in os.environ else "cpu",
        "devices": int(os.environ.get("WORLD_SIZE", "1")),
        "logger": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in overrides.get("callbacks", [])),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
    }
    return L.Trainer(**{**arguments, **overrides})
