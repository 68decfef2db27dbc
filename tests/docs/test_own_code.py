"""The pages on code of one's own: module.md, loop.md and saving.md of extend, coming_from/lightning.md."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lightning_ep import ParallelLayout, parallelize
from lightning_ep.data.corpus import train_tokenizer
from tests.docs.pages import block
from tests.hub_files import write_checkpoint
from tests.ranks import assert_ranks_agree, device, run_ranks
from tests.reference import relative_error
from tests.tiny import loader

MODULE, LOOP, SAVING = "docs/extend/module.md", "docs/extend/loop.md", "docs/extend/saving.md"
FIRST = "import torch\nimport torch.distributed as dist\n\n"
PLAIN = "import torch\nimport torch.distributed as dist\nimport torch.nn.functional"


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
    exec(block(LOOP, FIRST), names)
    return names["losses"][0], names["losses"][-1]


def test_the_loop_of_the_page_trains_on_two_ranks(tmp_path: Path) -> None:
    for first, last in run_ranks(2, _loop, tmp_path, init_process_group=False):
        assert last < first - 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exports/mine")
    assert model.config.num_experts == 8


def _files(root: Path) -> None:
    """The files that the pages have one make, beside one another."""
    (root / "decoder.py").write_text(block("docs/extend/plans.md", "import torch\n"))
    (root / "saving.py").write_text(block(SAVING, "from pathlib import Path\n"))


def _script(root: Path, code: str, given: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Runs a program as torchrun does: the losses that it prints, and the whole weights of its plain model."""
    os.chdir(root)
    sys.path.insert(0, str(root))
    names, printed = given, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.removesuffix("dist.destroy_process_group()\n"), names)
    plain = hasattr(names["model"], "layers")
    weights = {name: p.full_tensor().detach() for name, p in names["model"].named_parameters()} if plain else {}
    if plain and (world := dist.get_world_size()) > 1:
        assert len(names["model"].layers[0].moe.experts.up.to_local()) == 8 // world, "a rank holds its experts"
    dist.destroy_process_group()
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed.getvalue())], weights


def test_a_plain_model_trains_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    _files(tmp_path)
    code = block(LOOP, PLAIN)
    ((one, expected),) = run_ranks(1, _script, tmp_path, code, {}, init_process_group=False)
    (two, found), (nothing, _) = run_ranks(2, _script, tmp_path, code, {}, init_process_group=False)
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-5)
    assert nothing == []
    assert all(relative_error(found[name], weight) < 1e-5 for name, weight in expected.items())


def _balanced(rows: int) -> tuple[float, Tensor]:
    """Mean over the ranks of the page's loss, and the sum of their gradients."""
    names: dict[str, Any] = {"torch": torch, "dist": dist}
    exec(block(LOOP, "def balancing_loss"), names)
    rank, world = dist.get_rank(), dist.get_world_size()
    x_TH, weight = _routed(rows)
    weight = weight.to(device()).requires_grad_()
    probabilities = (x_TH.chunk(world)[rank].to(device()) @ weight).softmax(-1)
    loss = names["balancing_loss"](probabilities, probabilities.topk(2).indices) / world
    loss.backward()
    for summed in (total := loss.detach().clone(), weight.grad):
        dist.all_reduce(summed)
    return total.item(), weight.grad.cpu()


def _routed(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_TH = torch.randn(rows, 6, generator=generator) + torch.linspace(-1, 1, rows)[:, None]  # ranks have other tokens
    return x_TH, torch.randn(6, 5, generator=generator)


def test_a_balancing_loss_of_ranks_is_that_of_all_their_tokens() -> None:
    x_TH, weight = _routed(32)
    weight.requires_grad_()
    probabilities = (x_TH @ weight).softmax(-1)
    counts = torch.nn.functional.one_hot(probabilities.topk(2).indices, 5).sum((0, 1))
    expected = 5 * sum(counts[e] / counts.sum() * probabilities[:, e].mean() for e in range(5))
    (gradient,) = torch.autograd.grad(expected, weight)
    for loss, found in run_ranks(2, _balanced, 32):
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert relative_error(found, gradient) < 1e-6


def test_weights_from_before_experts_were_a_module_are_renamed(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(block("docs/extend/plans.md", "import torch\n"), names)
    wanted = names["Decoder"]().state_dict()
    names["old"] = {name.replace("moe.experts.", "moe."): value for name, value in wanted.items()}
    exec(block("docs/extend/plans.md", "import re\n"), names)
    assert names["old"].keys() == wanted.keys()


def test_a_loop_goes_on_from_its_checkpoint_on_another_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _files(tmp_path)
    plain = block(LOOP, PLAIN)
    begin, end = block(SAVING, "from saving import").split("    ...  # a step, with the batch of this number\n")
    exporting = block(SAVING, 'export("exports/plain"')
    ours = {
        "parameters(), lr=0.1)": "parameters(), lr=0.1, momentum=0.9)",  # which is state to resume
        "for step in range(20):\n": begin,
        "dist.destroy_process_group()\n": f"{end}{exporting}dist.destroy_process_group()\n",
    }
    code = _replaced(plain, ours)
    half = _replaced(code, {"range(done, 20)": "range(done, 10)"})
    (before, _), _ = run_ranks(2, _script, tmp_path, half, {}, init_process_group=False)
    ((after, weights),) = run_ranks(1, _script, tmp_path, code, {}, init_process_group=False)
    (tmp_path / "whole").mkdir()
    _files(tmp_path / "whole")
    (whole, expected), _ = run_ranks(2, _script, tmp_path / "whole", code, {}, init_process_group=False)
    assert [len(before), len(after)] == [2, 2]
    assert before + after == pytest.approx(whole, rel=1e-5)
    assert all(relative_error(weights[name], weight) < 1e-5 for name, weight in expected.items())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {}
    exec(block(SAVING, "from decoder import"), names)
    loaded = dict(names["model"].named_parameters())
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def test_a_loop_writes_what_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = 'model.save_pretrained("exports/mine")  # all ranks: each writes its own files\n'
    code = _replaced(block(LOOP, FIRST), {saving: block(SAVING, "model.save_pretrained")})
    tokenizer = train_tokenizer(iter(["zeta eta theta " * 50]), 262)
    run_ranks(2, _script, tmp_path, code, {"tokenizer": tokenizer}, init_process_group=False)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block(SAVING, "from transformers import"), names)
    assert names["model"].config.num_experts == 8
    assert names["tokenizer"]("zeta eta")["input_ids"] == tokenizer("zeta eta")["input_ids"]


def test_strategies_by_name_and_by_class() -> None:
    names: dict[str, Any] = {}
    exec(_replaced(block("docs/coming_from/lightning.md", "from lightning.pytorch"), ON_A_CPU), names)
    named = L.Trainer(strategy="ep", devices=1, accelerator="cpu")
    assert type(named.strategy) is type(names["trainer"].strategy)


def _saved_by_hand(root: Path, ep: int) -> list[str]:
    os.chdir(root)
    model = AutoModelForCausalLM.from_pretrained("tiny")
    parallelize(model, ParallelLayout.resolve(ep, "auto", 2, 2), device())
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), "shards.pt")
    page, names = "docs/operate/checkpoints.md", {"model": model}
    exec(block(page, "import torch\nimport torch.distributed"), names)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.detach().zero_()
    exec(block(page, "from torch.distributed.checkpoint.state_dict import set_model_state_dict"), names)
    return [
        name for name, param in model.named_parameters() if not torch.equal(param.to_local(), before[name].to_local())
    ]


@pytest.mark.parametrize("ep", [1, 2])
def test_whole_weights_are_gathered_for_torch_save(ep: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny")
    assert_ranks_agree(2, _saved_by_hand, tmp_path, ep)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    whole, expected = torch.load(tmp_path / "weights.pt"), plain.state_dict()
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], value) for name, value in expected.items())
    with pytest.raises(
        RuntimeError, match=r"got mixed torch\.Tensor and DTensor"
    ):  # the page says what comes otherwise
        plain.load_state_dict(torch.load(tmp_path / "shards.pt"))
