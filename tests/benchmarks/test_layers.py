"""Layers alone: what is timed computes what its peers compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import layers, records

CPU = torch.device("cpu")


def _median(row: dict[str, str]) -> float:
    return float(row["ms"].partition(" (")[0])


@pytest.mark.parametrize("sizes", ["tiny", "gpt-oss-tiny"])
def test_moe_layer_measures_the_same_maths_as_transformers(sizes: str) -> None:
    bodies = (layers.our_experts(sizes, CPU), layers.transformers_experts(sizes, CPU, "eager"))
    ours, theirs = (layers.gradients(body, body.parameters()) for body in bodies)
    inputs = layers.moe_inputs(sizes, 24, "skewed", 0, CPU)
    for mine, reference in zip(ours(*inputs), theirs(*inputs), strict=True):
        mine = getattr(mine, "to_local", lambda value=mine: value)()
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)


def test_moe_layer_is_measured_with_two_routers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "moe.jsonl"
    options = ["--sizes", "tiny", "--tokens", "24", "--repeats", "2", "--device", "cpu", "--json", str(path)]
    layers.main(["moe", *options])
    (record,) = records.read(path)
    routers = [row["router, hottest expert"].split(",")[0] for row in record["rows"]]
    assert routers == ["balanced"] * 3 + ["skewed"] * 3 + ["even"]
    assert all(_median(row) > 0 for row in record["rows"])
    assert "| the six grouped GEMMs alone | even |" in capsys.readouterr().out
    assert f"commit {record['commit']}" in path.with_suffix(".md").read_text()


def test_a_skewed_router_skews() -> None:
    def hottest(router: str) -> float:
        _, ids_TK, *_ = layers.moe_inputs("qwen3-30b-a3b", 4096, router, 0, CPU)
        counts_E = torch.bincount(ids_TK.reshape(-1), minlength=128).float()
        return (counts_E.max() / counts_E.mean()).item()

    assert hottest("balanced") < 1.6
    assert 3 < hottest("skewed") < 8


def test_attention_of_documents_is_measured_beside_whole_windows(tmp_path: Path, capsys: Any) -> None:
    options = ["--sizes", "tiny", "--tokens", "128", "--repeats", "2", "--device", "cpu"]
    layers.main(["attention", *options, "--json", str(tmp_path / "attention.jsonl")])
    rows = records.read(tmp_path / "attention.jsonl")[0]["rows"]
    assert [row["forward and backward"] for row in rows] == ["sdpa, a mask of documents", "sdpa, whole windows"]
    assert all(_median(row) > 0 for row in rows)
    assert "128 tokens of tiny" in capsys.readouterr().out


def test_losses_agree_with_the_plain_one() -> None:
    torch.manual_seed(0)
    hidden_TH, weight_VH = torch.randn(40, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets_T = torch.randint(0, 50, (40,))
    found = {
        name: (value := loss(hidden_TH, weight_VH, targets_T), *torch.autograd.grad(value, [hidden_TH, weight_VH]))
        for name, loss in layers.losses().items()
        if name != "Liger"  # on GPUs only
    }
    assert set(found) == {"plain", "lightning_ep"}
    for mine, reference in zip(found["lightning_ep"], found["plain"], strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_losses_are_measured_and_one_that_breaks_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    found = {**layers.losses(), "broken": broken}
    monkeypatch.setattr(layers, "losses", lambda: found)
    options = ["--sizes", "tiny", "--tokens", "24", "--repeats", "2", "--device", "cpu"]
    layers.main(["loss", *options, "--json", str(tmp_path / "loss.jsonl")])
    text = capsys.readouterr().out
    assert "| plain |" in text
    assert "| lightning_ep |" in text
    assert "| broken | RuntimeError: no such kernel |" in text


def test_steps_of_adamw_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "adamw.jsonl"
    options = ["--sizes", "tiny", "--layers", "1", "--repeats", "2", "--device", "cpu", "--json", str(path)]
    layers.main(["adamw", *options])
    rows = records.read(path)[0]["rows"]
    held = {row["optimizer"]: row["bytes per parameter, gradients too"] for row in rows}
    assert held["lightning_ep, fp32"] == "16"
    assert held["lightning_ep, bf16 stochastically"] == "8"
    assert all(float(row["ms per 1e9 parameters"]) > 0 for row in rows)
