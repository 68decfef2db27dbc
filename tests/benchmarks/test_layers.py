"""Layers alone: what is timed computes what its peers compute. The disk: the command runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import layers, records

CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", ["tiny", "gpt-oss-tiny"])
def test_moe_layer_measures_the_same_maths_as_transformers(sizes: str) -> None:
    ours = layers.forward_backward(layers.our_experts(sizes, CPU))
    theirs = layers.forward_backward(layers.transformers_experts(sizes, CPU, "eager"))
    inputs = layers.moe_inputs(sizes, 24, "skewed", 0, CPU)
    for mine, reference in zip(ours(*inputs), theirs(*inputs), strict=True):
        mine = getattr(mine, "to_local", lambda value=mine: value)()
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)


def test_moe_layer_is_measured_with_two_routers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "moe.json"
    options = ["--sizes", "tiny", "--tokens", "24", "--repeats", "2", "--device", "cpu", "--json", str(path)]
    layers.main(["moe", *options])
    record = json.loads(path.read_text())
    assert [row["router"].split(",")[0] for row in record["rows"]] == ["balanced"] * 3 + ["skewed"] * 3 + ["even"]
    assert all(row["ms"] > 0 for row in record["rows"])
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
    layers.main(["attention", *options, "--json", str(tmp_path / "attention.json")])
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["sdpa, a mask of documents", "sdpa, whole windows"]
    assert all(row["ms"] > 0 for row in rows)
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
    layers.main(["loss", *options, "--json", str(tmp_path / "loss.json")])
    text = capsys.readouterr().out
    assert "| plain |" in text
    assert "| lightning_ep |" in text
    assert "| broken | RuntimeError: no such kernel |" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "figures"),
    [
        ("weights", {"save_GB_per_s", "cold_read_GB_per_s", "cold_load_GB_per_s", "warm_load_GB_per_s"}),
        ("checkpoints", {"sync_s", "async_first_s", "async_blocked_s", "async_total_s", "blocked_share"}),
    ],
)
def test_disk_is_measured_and_left_as_it_was(what: str, figures: set[str], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--directory", str(tmp_path), "--sizes", "tiny", "--layers", "1", "--device", "cpu"]
    done = subprocess.run(
        [*torchrun, "-m", "benchmarks.disk", what, *options],
        cwd=records.ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures < set(found)
    assert found["ranks"] == 2
    assert found["command"].startswith(f"torchrun --nproc-per-node 2 -m benchmarks.disk {what}")
    assert list(tmp_path.iterdir()) == []
