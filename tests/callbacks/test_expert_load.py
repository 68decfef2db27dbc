"""What ExpertLoadMonitor logs is what routers chose, and what is planted is named in its pictures and its warning."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ep import ExpertParallelStrategy
from lightning_ep.callbacks import ExpertLoadMonitor
from tests.ranks import assert_ranks_agree
from tests.tiny import Samples, TinyModule, quiet

EXPERTS, TOP_K, LAYERS = 8, 2, 3
SIZES = {"num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}


class Padded(Samples):
    """Samples whose ends are padding, of another length each."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        return {**sample, "attention_mask": (torch.arange(self.length) < 2 + index % 7).long()}


class Module(TinyModule):
    """Keeps what every router chose in training, by layer, with the tokens that are no padding."""

    def __init__(self) -> None:
        super().__init__(**SIZES)
        self.chosen: list[tuple[int, int, Tensor, Tensor, Tensor]] = []

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            for layer, block in enumerate(self.model.model.layers):
                block.mlp.gate.register_forward_hook(lambda _, args, out, layer=layer: self.keep(layer, out))

    def keep(self, layer: int, out: tuple[Tensor, Tensor, Tensor]) -> None:
        if self.mask is not None and torch.is_grad_enabled():
            step = self.trainer.global_step + 1
            self.chosen.append((step, layer, self.mask.flatten().bool(), out[2].clone(), out[0].detach().double()))

    mask: Tensor | None = None

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        self.mask = batch["attention_mask"]
        labels = batch["labels"].masked_fill(self.mask == 0, -100)
        return self.model(input_ids=batch["input_ids"], attention_mask=self.mask, labels=labels).loss


def _expected(chosen: list[tuple[int, int, Tensor, Tensor, Tensor]], step: int, ep: int) -> dict[str, float]:
    """What is logged of a step, counted token by token on what all ranks chose."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, [one for one in chosen if one[0] == step])
    layers: list[dict[str, float]] = []
    for layer in range(LAYERS):
        counts, ranks, rows, tokens, entropy = [0] * EXPERTS, [0] * len(every), 0, 0, 0.0
        for rank, calls in enumerate(every):
            for _, of, counted_T, ids_TK, logits_TE in calls:
                for counted, ids, logits in zip(counted_T.tolist(), ids_TK.tolist(), logits_TE, strict=True):
                    if of != layer or not counted:
                        continue
                    owners = [rank // ep * ep + expert // (EXPERTS // ep) for expert in ids]
                    for expert, owner in zip(ids, owners, strict=True):
                        counts[expert] += 1
                        ranks[owner] += 1
                    rows += len(set(owners) - {rank})
                    tokens += 1
                    entropy += torch.distributions.Categorical(logits=logits).entropy().item()
        mean = statistics.fmean(counts)
        layers.append(
            {
                "max_violation": max(counts) / mean - 1,
                "load_variation": statistics.pstdev(counts) / mean,
                "entropy": entropy / tokens / math.log(EXPERTS),
                "dead_experts": counts.count(0),
                "straggler_factor": max(ranks) / statistics.fmean(ranks),
                "rows_per_token": rows / tokens,
            }
        )
    found = {name: statistics.fmean(layer[name] for layer in layers) for name in layers[0]}
    found["dead_experts"] *= LAYERS
    return found | {"max_violation_worst_layer": max(layer["max_violation"] for layer in layers)}


def _run(root: Path, ep: int, recompute: Any) -> list[str]:
    module = Module()
    strategy = ExpertParallelStrategy(ep=ep, activation_checkpointing=recompute)
    trainer = quiet(
        root, strategy=strategy, callbacks=[ExpertLoadMonitor()], logger=CSVLogger(root, version=0), max_steps=4,
        log_every_n_steps=2, accumulate_grad_batches=2, val_check_interval=2, limit_val_batches=1,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Padded(64), batch_size=2), DataLoader(Padded(8), batch_size=2))
    wrong = []
    rows = []
    if trainer.is_global_zero:
        with (root / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["routing/entropy"]]
        wrong += [
            f"logged at {row['step']}" for row, step in zip(rows, (1, 3), strict=True) if int(row["step"]) != step
        ]
    for index, step in enumerate((2, 4)):
        expected = _expected(module.chosen, step, ep)
        for name, value in expected.items() if rows else ():
            if not math.isclose(float(rows[index][f"routing/{name}"]), value, rel_tol=2e-6, abs_tol=1e-6):
                wrong.append(f"{name} of step {step}: {rows[index][f'routing/{name}']} in place of {value}")
        if ep == 2 and not expected["rows_per_token"] > 0.3:
            wrong.append("no row travelled")
    if trainer.is_global_zero:
        names = sorted(path.name for path in (root / "lightning_logs" / "version_0" / "routing").iterdir())
        if names != ["expert_load.png", "load_curves.png", "straggler_factor.png"]:
            wrong.append(f"pictures: {names}")
    return wrong


@pytest.mark.parametrize(("ep", "recompute"), [(1, "none"), (2, "full")])
def test_what_is_logged_is_what_all_ranks_chose_in_that_step(ep: int, recompute: str, tmp_path: Path) -> None:
    assert_ranks_agree(2, _run, tmp_path, ep, recompute, init_process_group=False)
