"""The pages on code of one's own: extend/module.md, extend/loop.md, coming_from/lightning.md."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_ep import ParallelLayout, parallelize
from tests.docs.pages import block
from tests.hub_files import write_checkpoint
from tests.ranks import assert_ranks_agree, device, run_ranks
from tests.tiny import loader

MODULE, LOOP = "docs/extend/module.md", "docs/extend/loop.md"


class Batches(L.LightningDataModule):
    """Ids and labels, as the module of the page takes them."""

    def train_dataloader(self) -> Any:
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in loader(8).dataset]
        return DataLoader(rows, batch_size=2)


def _replaced(code: str, ours: dict[str, str]) -> str:
    for printed, mine in ours.items():
        assert printed in code, printed
        code = code.replace(printed, mine)
    return code


ON_A_CPU = {"ep=8": "ep=1", "devices=8": "devices=1, accelerator='cpu'"}


def test_the_module_of_the_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "tiny")
    names: dict[str, Any] = {"datamodule": Batches()}
    exec(_replaced(block(MODULE, "import lightning as L"), {"Qwen/Qwen3-30B-A3B": "tiny"}), names)
    exec(_replaced(block(MODULE, "strategy ="), {**ON_A_CPU, "max_steps=1000": "max_steps=2"}), names)
    assert names["trainer"].global_step == 2
    assert "train/loss" in names["trainer"].callback_metrics


def _loop(root: Path) -> tuple[float, float]:
    os.chdir(root)
    names: dict[str, Any] = {}
    exec(block(LOOP, "import torch\n"), names)
    return names["losses"][0], names["losses"][-1]


def test_the_loop_of_the_page_trains_on_two_ranks(tmp_path: Path) -> None:
    for first, last in run_ranks(2, _loop, tmp_path, init_process_group=False):
        assert last < first - 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exports/mine")
    assert model.config.num_experts == 8


def _plain(root: Path) -> tuple[float, float, int]:
    """The loop, with the model of plans.md in the place of its own."""
    os.chdir(root)
    loop, own = block(LOOP, "import torch\n"), block(LOOP, "model = Decoder()")
    before, _, after = loop.partition("config = {")
    layout = after[after.index("layout =") : after.index("parallelize(model")]
    steps = after[after.index("optimizer =") : after.index("if rank == 0")]
    loss = "model(input_ids=batch, labels=batch, use_cache=False).loss"
    mine = "F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())"
    names: dict[str, Any] = {}
    exec(block("docs/extend/plans.md", "import lightning as L"), names)
    exec(before + layout + own + _replaced(steps, {loss: mine}), names)
    held = len(names["model"].layers[0].moe.experts.up.to_local())
    dist.destroy_process_group()
    return names["losses"][0], names["losses"][-1], held


def test_a_plain_model_trains_in_that_loop(tmp_path: Path) -> None:
    for first, last, held in run_ranks(2, _plain, tmp_path, init_process_group=False):
        assert last < first
        assert held == 4, "half of its eight experts"


def test_strategies_by_name_and_by_class() -> None:
    names: dict[str, Any] = {}
    exec(_replaced(block("docs/coming_from/lightning.md", "from lightning.pytorch"), ON_A_CPU), names)
    named = L.Trainer(strategy="ep", devices=1, accelerator="cpu")
    assert type(named.strategy) is type(names["trainer"].strategy)


def _saved_by_hand(root: Path) -> list[str]:
    os.chdir(root)
    model = AutoModelForCausalLM.from_pretrained("tiny")
    parallelize(model, ParallelLayout.resolve(2, 1, 2, 2), device())
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), "shards.pt")
    exec(block("docs/operate/checkpoints.md", "import torch\nimport torch.distributed"), {"model": model})
    return []


def test_whole_weights_are_gathered_for_torch_save(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny")
    assert_ranks_agree(2, _saved_by_hand, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    whole, expected = torch.load(tmp_path / "weights.pt"), plain.state_dict()
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], value) for name, value in expected.items())
    with pytest.raises(
        RuntimeError, match=r"got mixed torch\.Tensor and DTensor"
    ):  # the page says what comes otherwise
        plain.load_state_dict(torch.load(tmp_path / "shards.pt"))
