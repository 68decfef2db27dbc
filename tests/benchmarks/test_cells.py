"""Cells: what their names say, and what every trainer is given alike."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_moe import Qwen3MoeForCausalLM

from benchmarks.cells import Cell, default_trainers, parse_shape
from benchmarks.workload import Popularity, batches, fill_parameters
from lightning_ep.planner import QWEN3_30B_A3B, read_widths


@pytest.mark.parametrize("text", ["4096", "4x", "0x16", "axb", "4x1"])
def test_bad_shapes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="4x4096"):
        parse_shape(text)


@pytest.mark.parametrize(
    ("trainer", "recompute", "compiled"),
    [
        ("lightning_ep/ep=2", "none", False),
        ("lightning_ep/ep=2+full", "full", False),
        ("lightning_ep/ep=2+selective+compile", "selective", True),
        ("transformers/ep+full+compile", "full", True),
        ("torchtitan/ep+full", "full", False),
    ],
)
def test_suffixes_say_what_is_recomputed_and_compiled(trainer: str, recompute: str, compiled: bool) -> None:
    cell = Cell(trainer, 1, 16, 2)
    assert (cell.base, cell.recompute, cell.compile) == (trainer.partition("+")[0], recompute, compiled)
    assert cell.ours == trainer.startswith("lightning_ep")


@pytest.mark.parametrize(
    "trainer",
    [
        "megatron",
        "lightning_ep/ep=2,cp=",
        "lightning_ep/ep=2+compile+full",
        "lightning_ep/ep=2+all",
        "transformers/ep+selective",
        "torchtitan/ep+compile",
    ],
)
def test_unknown_trainers_and_suffixes_are_refused_with_the_choices(trainer: str) -> None:
    with pytest.raises(ValueError, match=r"cp=M\]\[,tp=M\]\[\+selective\|\+full\].*torchtitan/ep"):
        Cell(trainer, 1, 16, 2)


def test_ranks_that_share_sequences_count_their_tokens_once() -> None:
    shared, alone = (Cell(f"lightning_ep/ep=2{cp}+compile", 1, 65_536, 2) for cp in (",cp=2", ""))
    assert (shared.layout, shared.compile, shared.tokens) == ({"ep": 2, "cp": 2}, True, 32_768)
    assert (alone.layout, alone.tokens) == ({"ep": 2}, 65_536)
    split = Cell("lightning_ep/ep=2,tp=2+full", 1, 65_536, 2)
    assert (split.layout, split.recompute, split.tokens) == ({"ep": 2, "tp": 2}, "full", 32_768)


def test_ranks_that_share_sequences_get_the_same_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(trainer: str, rank: int) -> torch.Tensor:
        monkeypatch.setenv("RANK", str(rank))
        return next(batches(Cell(trainer, 2, 16, 2, sizes="tiny"), 1))["input_ids"]

    assert torch.equal(first("lightning_ep/ep=2,cp=2", 0), first("lightning_ep/ep=2,cp=2", 1))
    assert not torch.equal(first("lightning_ep/ep=2", 0), first("lightning_ep/ep=2", 1))
    assert torch.equal(first("lightning_ep/ep=2", 1), first("transformers/fsdp2", 1))


def test_chats_and_what_stands_in_their_place_have_the_same_boundaries() -> None:
    def get(data: str) -> dict[str, torch.Tensor]:
        return next(batches(Cell("lightning_ep/ep=2", 2, 256, 2, sizes="tiny", data=data), 1))

    chats, random = get("chats"), get("boundaries")
    assert chats["position_ids"].equal(random["position_ids"])
    assert 2 < (chats["position_ids"] == 0).sum() < 64
    assert (chats["labels"] == -100).equal(random["labels"] == -100)
    assert 0.3 < (chats["labels"] != -100).float().mean() < 0.95
    assert not chats["input_ids"].equal(random["input_ids"])
    learnt = random["labels"] != -100
    assert random["labels"][learnt].equal(random["input_ids"][learnt])
    with pytest.raises(ValueError, match="knows no data='chats'"):
        Cell("transformers/fsdp2", 2, 256, 2, data="chats")


def test_balanced_routers_are_said_so() -> None:
    cell = Cell("lightning_ep/ep=2", 2, 16, 2, sizes="tiny", layers=1, balanced=True)
    assert cell.shape == "2x16, balanced"


def test_what_a_cell_changes_of_a_step_is_in_its_shape() -> None:
    assert (
        Cell("lightning_ep/ep=2", 4, 16, 2, accumulate=8, exchange="none").shape == "4x16, 8 micro-batches, no exchange"
    )
    assert Cell("lightning_ep/ep=2", 4, 16, 2, accumulate=8).tokens == 8 * 4 * 16
    assert Cell("lightning_ep/ep=2", 4, 16, 2, monitor=2).shape == "4x16, monitor of every 2"
    for changed in ({"accumulate": 8}, {"monitor": 1}, {"balanced": True}):
        with pytest.raises(ValueError, match=r"fsdp2 knows no \w+=\w+: only lightning_ep/ep=N does"):
            Cell("transformers/fsdp2", 4, 16, 2, **changed)
    with pytest.raises(ValueError, match="parts of sequences"):
        Cell("lightning_ep/ep=2,cp=2", 4, 16, 2, exchange="none")


def test_trees_take_turns_and_peers_have_none() -> None:
    cell = Cell("lightning_ep/ep=2", 1, 16, 2)
    turns = cell.in_turns("/old")
    assert [turn.tree for turn in turns] == ["/old", None, None, "/old"]
    assert len({*turns, cell}) == 5
    with pytest.raises(ValueError, match="knows no tree='/old': only lightning_ep/ep=N does"):
        Cell("transformers/fsdp2", 1, 16, 2).in_turns("/old")


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_every_default_trainer_exists(ranks: int) -> None:
    trainers = default_trainers(ranks)
    assert [Cell(trainer, 1, 16, ranks).trainer for trainer in trainers] == trainers
    assert all(Cell(trainer, 1, 16, ranks).ours for trainer in default_trainers(ranks, peers=False))


def test_the_planner_reads_the_sizes_that_are_trained() -> None:
    assert read_widths(Cell("lightning_ep/ep=1", 1, 16, 1, layers=3).config().to_dict()) == (QWEN3_30B_A3B, 3)


def test_fill_draws_every_parameter_and_no_buffer() -> None:
    with torch.device("meta"):
        module = torch.nn.ModuleDict({"norm": torch.nn.RMSNorm(8), "linear": torch.nn.Linear(64, 64, bias=False)})
        module.register_buffer("table", torch.zeros(2))
    fill_parameters(module, torch.device("cpu"))
    assert module["norm"].weight.eq(1).all()
    assert module["linear"].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert module.table.is_meta


def test_the_hottest_expert_is_that_of_the_first_step() -> None:
    model = Qwen3MoeForCausalLM(Cell("lightning_ep/ep=1", 1, 16, 1, sizes="tiny", layers=1).config())
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[:4, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])  # the same four of eight for every token
    popularity = Popularity(model)
    gate(torch.ones(10, 32))
    assert popularity.read() == 2
    assert not gate._forward_hooks
