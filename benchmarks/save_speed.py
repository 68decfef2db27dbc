"""How long a checkpoint keeps training waiting: saved at once, and behind the training (`async_save=True`).

    python benchmarks/save_speed.py --layers 2 --directory /local/disk
    torchrun --nproc-per-node 2 benchmarks/save_speed.py --layers 4 --ep 2 --directory /local/disk

Trains a model of Qwen3-30B-A3B's width (2048, 128 experts of 768) with AdamW for a few steps on random tokens, saving
after each, and prints one JSON line on rank 0:

- `gb`: 1e9 bytes of weights and optimizer state, all ranks;
- `sync_s`: seconds of a save at once (median), with checksums and fsync, and `sync_gb_per_s`;
- `async_first_s`: seconds that the first save behind keeps training waiting, page-locking host memory included;
- `async_blocked_s`: the same of the later ones (median);
- `async_total_s`: seconds from the start of such a save until it is durable (median);
- `blocked_share`: `async_blocked_s / sync_s`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Qwen3MoeConfig

from lightning_ep import CausalLM, ExpertParallelStrategy


class Tokens(IterableDataset[dict[str, Tensor]]):
    def __init__(self, vocab_size: int, length: int) -> None:
        self.vocab_size, self.length = vocab_size, length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            ids = torch.randint(self.vocab_size, (self.length,))
            yield {"input_ids": ids, "labels": ids}


class TimedSaves(L.Callback):
    """Saves after every step, over the same name, and notes how long the training waits and the save takes in all."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "benchmark.ckpt"
        self.blocked: list[float] = []
        self.total: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._synchronize(trainer)
        start = time.perf_counter()
        trainer.save_checkpoint(self.path)
        self.blocked.append(time.perf_counter() - start)
        assert isinstance(trainer.strategy, ExpertParallelStrategy)
        trainer.strategy.wait_for_checkpoints()
        trainer.strategy.barrier()
        self.total.append(time.perf_counter() - start)

    @staticmethod
    def _synchronize(trainer: L.Trainer) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        trainer.strategy.barrier()


def train(config: Qwen3MoeConfig, ep: int, directory: Path, saves: int, asynchronous: bool) -> tuple[TimedSaves, float]:
    timed = TimedSaves(directory)
    on_gpu = torch.cuda.is_available()
    trainer = L.Trainer(
        strategy=ExpertParallelStrategy(ep=ep, async_save=asynchronous),
        accelerator="gpu" if on_gpu else "cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=int(os.environ.get("WORLD_SIZE", "1")) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        precision="bf16-mixed" if on_gpu else "32-true",
        max_steps=saves,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[timed],
    )
    module = CausalLM(config, pretrained=False, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-5))
    trainer.fit(module, DataLoader(Tokens(config.vocab_size, 64), batch_size=1))
    # Weights and two moments, fp32.
    size = 3 * sum(param.numel() * param.element_size() for param in module.parameters())
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        shutil.rmtree(timed.path)
    return timed, size / 1e9


def main(
    layers: int = 2,
    ep: int = 1,
    directory: Path = Path("save_speed"),
    saves: int = 4,
    hidden_size: int = 2048,
    num_experts: int = 128,
    moe_intermediate_size: int = 768,
    vocab_size: int = 151936,
) -> None:
    """Measures saves.

    Args:
        layers: Decoder layers; each is 604 million parameters, 7.2 GB with AdamW's moments.
        ep: Expert-parallel size.
        directory: Where checkpoints go; on the disk to be measured.
        saves: Saves of each kind, 2 or more.
        hidden_size: Width of the model.
        num_experts: Experts per layer.
        moe_intermediate_size: Width of an expert.
        vocab_size: Size of the vocabulary.
    """
    sizes: dict[str, Any] = dict(  # noqa: C408
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=hidden_size, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, head_dim=max(8, hidden_size // 16), num_experts=num_experts,
        moe_intermediate_size=moe_intermediate_size, num_experts_per_tok=8,
    )  # fmt: skip
    config = Qwen3MoeConfig(**sizes)
    directory.mkdir(parents=True, exist_ok=True)
    sync, size = train(config, ep, directory, saves, asynchronous=False)
    behind, _ = train(config, ep, directory, saves, asynchronous=True)
    if int(os.environ.get("RANK", "0")) == 0:
        sync_s, blocked_s = statistics.median(sync.blocked), statistics.median(behind.blocked[1:])
        result = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "ranks": int(os.environ.get("WORLD_SIZE", "1")), "layers": layers, "gb": size,
            "sync_s": sync_s, "sync_gb_per_s": size / sync_s, "async_first_s": behind.blocked[0],
            "async_blocked_s": blocked_s, "async_total_s": statistics.median(behind.total[1:]),
            "blocked_share": blocked_s / sync_s,
        }  # fmt: skip
        print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in result.items()}), flush=True)


if __name__ == "__main__":
    auto_cli(main)
