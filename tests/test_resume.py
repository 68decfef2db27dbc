"""A run that is interrupted and resumed, in mid-epoch too, has the losses of one that was not, bit for bit."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_ep import CausalLM, ExpertParallelStrategy
from lightning_ep.data import TextDataModule
from tests.distributed import run_ranks
from tests.reference import tiny_config
from tests.tiny import quiet

STEPS = 7


class _Losses(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_before_zero_grad(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if "train/loss" in trainer.callback_metrics:
            self.losses.append(trainer.callback_metrics["train/loss"].item())


def _fit(
    root: Path, steps: int, resume: str | None, save_at: int | None, distributed: bool, accumulate: int
) -> list[float]:
    L.seed_everything(3, verbose=False)
    losses = _Losses()
    checkpoint = ModelCheckpoint(root / "saved", filename="{step}", every_n_train_steps=save_at or 1000, save_top_k=-1)
    trainer = quiet(
        root,
        strategy=ExpertParallelStrategy(ep=2, save_distributed_checkpoint=distributed),
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        callbacks=[losses, checkpoint],
    )
    module = CausalLM(
        tiny_config(vocab_size=260),
        pretrained=False,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=10),
    )
    data = TextDataModule(
        str(root / "text"), sequence_length=16, batch_size=2, vocab_size=260, validation_fraction=0.3,
        cache_dir=str(root / "cache"),
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    assert trainer.global_step == steps
    return losses.losses


def _runs(root: Path, save_at: int, distributed: bool, accumulate: int) -> tuple[list[float], list[float]]:
    whole = _fit(root, STEPS, None, save_at, distributed, accumulate)
    rest = _fit(root, STEPS, str(root / "saved" / f"step={save_at}.ckpt"), None, distributed, accumulate)
    return whole, rest


@pytest.mark.parametrize(
    ("save_at", "distributed", "accumulate"), [(2, True, 1), (5, True, 1), (2, False, 1), (2, True, 2)]
)
def test_losses_after_a_resume(tmp_path: Path, save_at: int, distributed: bool, accumulate: int) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for index in range(4):
        (text / f"{index}.txt").write_text(
            f"the quick brown fox {index} jumps over {index * 7} lazy dogs\n" * (2 + index)
        )
    (whole, rest), (other, _) = run_ranks(
        2, _runs, tmp_path, save_at, distributed, accumulate, init_process_group=False
    )
    assert whole == other
    assert len(set(whole)) == len(whole) >= STEPS - 1
    assert rest[-(STEPS - save_at - 1) :] == whole[-(STEPS - save_at - 1) :]
