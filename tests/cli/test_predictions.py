"""`lightning-ep predict --output`: one line for each sample, once, in order, whatever the ranks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import AutoModelForCausalLM

from lightning_ep import cli
from lightning_ep.callbacks import WritePredictions
from tests.cli.test_cli import TinyData, TinyModule
from tests.hub_files import write_checkpoint
from tests.ranks import run_ranks
from tests.reference import VOCAB
from tests.tiny import quiet

BRIEF = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
ALONE = [*BRIEF, "--trainer.strategy", "auto", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
SIZE = 7


def _sample(index: int) -> dict[str, Tensor]:
    ids = torch.arange(9) * (index + 3) % VOCAB
    labels = torch.where(torch.arange(9) < index, torch.tensor(-100), ids)
    return {"input_ids": ids, "labels": labels}


class _Samples(Dataset):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return _sample(index)


class _Stream(IterableDataset):
    """Each rank has every second sample."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        yield from map(_sample, range(rank, SIZE, world))


class Data(LightningDataModule):
    """Samples of several lengths of targets.

    Args:
        batch_size: How many in a batch.
        streamed: Whether as an iterable dataset.
    """

    def __init__(self, batch_size: int = 2, streamed: bool = False) -> None:
        super().__init__()
        self.batch_size, self.streamed = batch_size, streamed

    def predict_dataloader(self) -> Any:
        return DataLoader(_Stream() if self.streamed else _Samples(), batch_size=self.batch_size)


@torch.no_grad()
def _expected(hub: Path) -> list[tuple[float, int]]:
    model = AutoModelForCausalLM.from_pretrained(hub)
    found = []
    for sample in map(_sample, range(SIZE)):
        log_probs = model(sample["input_ids"][None]).logits[0].double().log_softmax(-1)
        targets = [(i, t) for i, t in enumerate(sample["labels"][1:].tolist()) if t != -100]
        found.append((sum(log_probs[i, t].item() for i, t in targets), len(targets)))
    return found


def _predict(*arguments: str) -> None:
    cli.main(["predict", *BRIEF, "--trainer.accelerator", "cpu", "--trainer.logger", "false", *arguments])


@pytest.mark.parametrize(
    ("world", "strategy", "data"),
    [
        (1, {"ep": 1}, {}),
        (2, {"ep": 2}, {"batch_size": 3}),  # two batches for a rank and one for the other
        (2, {"ep": 2}, {"batch_size": 1, "streamed": "true"}),
        (2, {"ep": 1, "tp": 2}, {}),
    ],
    ids=["one process", "ep=2", "streamed", "tp=2"],
)
def test_each_sample_is_written_once_and_in_order(
    world: int, strategy: dict[str, int], data: dict[str, Any], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "hub")
    output = tmp_path / "new" / "predictions.jsonl"
    options = ["--model", "lightning_ep.CausalLM", "--model.model", str(tmp_path / "hub"), "--output", str(output)]
    options += ["--data", f"{__name__}.Data", *(f"--data.{key}={value}" for key, value in data.items())]
    options += [f"--trainer.strategy.{key}={value}" for key, value in strategy.items()]
    options += ["--trainer.devices", str(world)]
    run_ranks(world, _predict, *options, init_process_group=False)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(SIZE))
    for line, (likelihood, tokens) in zip(lines, _expected(tmp_path / "hub"), strict=True):
        assert line.keys() == {"index", "log_likelihood", "tokens"}
        assert line["log_likelihood"] == pytest.approx(likelihood, rel=1e-5)
        assert line["tokens"] == tokens
    assert [path.name for path in output.parent.iterdir()] == [output.name]


class _TwoLoaders(TinyModule):
    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"sum": batch.sum(1), "name": ["a"] * len(batch)}


def test_lines_of_several_loaders_say_which(tmp_path: Path) -> None:
    loaders = [DataLoader(torch.full((size, 4), float(size)), batch_size=2) for size in (3, 1)]
    writer = WritePredictions(str(tmp_path / "out.jsonl"))
    quiet(tmp_path, strategy="auto", devices=1, callbacks=[writer]).predict(_TwoLoaders(), loaders)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        *({"dataloader": 0, "index": index, "sum": 12.0, "name": "a"} for index in range(3)),
        {"dataloader": 1, "index": 0, "sum": 4.0, "name": "a"},
    ]


def test_what_is_no_entry_per_sample_is_refused_and_no_file_is_written(tmp_path: Path) -> None:
    writer = WritePredictions(str(tmp_path / "out.jsonl"))
    trainer = quiet(tmp_path, strategy="auto", devices=1, callbacks=[writer])
    with pytest.raises(TypeError, match="one entry per sample; it has returned Tensor"):
        trainer.predict(TinyModule(), TinyData().predict_dataloader())
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_is_there_is_refused_and_other_commands_have_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-ep"])
    output = tmp_path / "out.jsonl"
    output.write_text("work\n")
    writer = WritePredictions(str(output))
    with pytest.raises(FileExistsError, match="is not replaced"):
        quiet(tmp_path, strategy="auto", devices=1, callbacks=[writer]).predict(
            _TwoLoaders(), TinyData().predict_dataloader()
        )
    assert output.read_text() == "work\n"
    module = ["--model", "tests.cli.test_cli.TinyModule", "--data", "tests.cli.test_cli.TinyData", *ALONE]
    with pytest.raises(SystemExit):
        cli.main(["predict", *module, "--output", str(output)])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-ep: error")]
    assert len(errors) == 1
    assert "is not replaced" in errors[0]
    with pytest.raises(SystemExit):
        cli.main(["validate", *module, "--output", str(output)])
    assert "no option 'output'" in capsys.readouterr().err
