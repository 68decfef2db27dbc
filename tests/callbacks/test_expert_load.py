"""What ExpertLoadMonitor logs is what routers chose, and what is planted is named in its pictures and its warning."""

from __future__ import annotations

import csv
import math
import re
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ep import ExpertParallelStrategy
from lightning_ep.callbacks import ExpertLoadMonitor
from lightning_ep.routing import pictures
from lightning_ep.routing.metrics import Routed, RoutingSummary
from tests.ranks import assert_ranks_agree, run_ranks
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
        folder = root / "lightning_logs" / "version_0" / "routing"
        names = sorted(path.name for path in folder.iterdir())
        if names != ["expert_load.csv", "expert_load.png", "load_curves.png", "straggler_factor.png"]:
            wrong.append(f"files: {names}")
        with (folder / "expert_load.csv").open() as file:
            loads = [float(row["load"]) for row in csv.DictReader(file)]
        highest = [max(loads[layer * EXPERTS :][:EXPERTS]) - 1 for layer in range(LAYERS)]
        both = [float(row["routing/max_violation_worst_layer"]) for row in rows]
        if len(loads) != LAYERS * EXPERTS or not math.isclose(sum(loads), len(loads), rel_tol=1e-3):
            wrong.append(f"loads of experts: {loads}")
        if not max(highest) <= max(both) + 1e-3:  # in the table both steps are one
            wrong.append(f"{max(highest)} above the mean in the table, {both} in the steps")
    return wrong


@pytest.mark.parametrize(("ep", "recompute"), [(1, "none"), (2, "full")])
def test_what_is_logged_is_what_all_ranks_chose_in_that_step(ep: int, recompute: str, tmp_path: Path) -> None:
    assert_ranks_agree(2, _run, tmp_path, ep, recompute, init_process_group=False)


HOT, DEAD = (2, 5), 1  # layer and expert; a layer


class Planted(Module):
    """Every second choice of a layer is one expert, and a layer has only two experts left."""

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            blocks = [layer.mlp for layer in self.model.model.layers]
            blocks[HOT[0]].gate.register_forward_hook(lambda _, args, out: (*out[:2], _planted(out[2], hot=True)))
            blocks[DEAD].gate.register_forward_hook(lambda _, args, out: (*out[:2], _planted(out[2], hot=False)))


def _planted(ids_TK: Tensor, hot: bool) -> Tensor:
    every_T = torch.arange(ids_TK.shape[0], device=ids_TK.device)
    if not hot:
        return torch.tensor([3, 4], device=ids_TK.device).expand_as(ids_TK).contiguous()
    others = torch.tensor([expert for expert in range(EXPERTS) if expert != HOT[1]], device=ids_TK.device)
    return torch.stack([torch.full_like(every_T, HOT[1]), others[every_T % len(others)]], dim=1)


def _titles(root: Path) -> list[str]:
    """Trains on what is planted; what is written in the pictures, and what was warned of."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save = pictures.save
        patch.setattr(pictures, "save", lambda figure, path: (said.append(_text(figure)), save(figure, path))[1])
        trainer = quiet(root, callbacks=[ExpertLoadMonitor()], max_steps=10, log_every_n_steps=1)
        trainer.fit(Planted(), DataLoader(Padded(40), batch_size=2))
    return [*said, *(str(one.message) for one in caught if "Routing in steps" in str(one.message))]


def _text(figure: Any) -> str:
    return "\n".join(ax.get_title(loc="left") for ax in figure.axes)


def test_a_hot_expert_and_a_dead_layer_are_named_in_pictures_and_once_in_a_warning(tmp_path: Path) -> None:
    first, second = run_ranks(2, _titles, tmp_path, init_process_group=False)
    assert second == [], "the first rank speaks for all"
    load, _, straggler, warned = first  # after 10 steps, and not again at the end
    assert "layer 2 expert 5 (4.0)" in load
    assert "without a token (black): layer 1: 6 of 8 experts" in load
    assert re.search(r"in layer 2 rank 1 has 1\.[1-5]\d times the mean", straggler), "experts 4 to 7 are of rank 1"
    assert re.search(r"steps 1 to 10: layer 1 has collapsed to about 2.0 of 8 experts \(experts 0 to 2, 5 to 7", warned)
    assert "layer 2" not in warned, "a hot expert alone is no collapse"
    assert "CausalLM(router=...)" in warned
    assert str(tmp_path / "routing") in warned
    for name in ("expert_load", "load_curves", "straggler_factor"):
        assert (tmp_path / "routing" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def _logged(root: Path, logger: Callable[[], Any]) -> None:
    trainer = quiet(root, callbacks=[ExpertLoadMonitor()], logger=logger(), max_steps=2, log_every_n_steps=1)
    trainer.fit(Planted(), DataLoader(Padded(8), batch_size=2))


PICTURES = ("expert_load", "load_curves", "straggler_factor")


@pytest.mark.slow
def test_pictures_are_in_the_event_file_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_ranks(2, _logged, tmp_path, partial(TensorBoardLogger, tmp_path, "run", 0), init_process_group=False)
    events = EventAccumulator(str(tmp_path / "run" / "version_0"), size_guidance={"images": 0})
    events.Reload()
    for name in PICTURES:
        (image,) = events.Images(f"routing/{name}")
        assert image.encoded_image_string[:4] == b"\x89PNG"
        assert image.step == 2
        assert image.width > 500
        assert len(image.encoded_image_string) > 10_000, "it is not blank"
    assert [event.step for event in events.Scalars("routing/entropy")] == [0, 1]


@pytest.mark.slow
def test_pictures_are_in_the_files_of_wandb_offline(tmp_path: Path) -> None:
    run_ranks(2, _logged, tmp_path, partial(WandbLogger, "run", tmp_path, offline=True), init_process_group=False)
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media/images/routing")
    (folder,) = tmp_path.rglob("straggler_factor.png")
    for name in PICTURES:
        (image,) = media.glob(f"{name}_*.png")
        assert image.read_bytes() == (folder.parent / f"{name}.png").read_bytes()
        assert image.read_bytes()[:4] == b"\x89PNG"


def test_pictures_go_to_tensorboard_and_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[Any, ...]] = []
    wandb, tensorboard = (object.__new__(kind) for kind in (WandbLogger, TensorBoardLogger))  # neither has a service
    monkeypatch.setattr(WandbLogger, "log_image", lambda _, key, images, step: logged.append((key, *images, step)))
    run = SimpleNamespace(add_figure=lambda tag, figure, step: logged.append((tag, type(figure).__name__, step)))
    monkeypatch.setattr(TensorBoardLogger, "experiment", run)
    metric = RoutingSummary({"layers.0.experts": 4})
    metric.update([Routed(torch.tensor([[0, 1], [0, 2]]))])
    monitor = ExpertLoadMonitor()
    monitor._watched, monitor._folder = SimpleNamespace(layers=metric.layers), tmp_path  # type: ignore[assignment]
    monitor._history.add(3, metric.measures(metric.totals_MC))
    trainer: Any = SimpleNamespace(loggers=[wandb, tensorboard, object()], is_global_zero=True, global_step=3)
    monitor.on_train_end(trainer, None)  # type: ignore[arg-type]
    names = ["expert_load", "load_curves"]  # of one rank there is no third
    expected = [((f"routing/{n}", f"{tmp_path}/{n}.png", 3), (f"routing/{n}", "Figure", 3)) for n in names]
    assert logged == [one for pair in expected for one in pair]
    monkeypatch.setattr(pictures, "available", lambda: False)
    monitor._history.add(4, metric.measures(metric.totals_MC))
    monitor.on_train_end(trainer, None)  # type: ignore[arg-type]
    assert len(logged) == 4
