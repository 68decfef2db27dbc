"""Loss curves of rounded weights: the table against numbers made by hand, and the command at its smallest."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records, rounding


def _run(way: str, seed: int, *losses: float) -> dict[str, Any]:
    return {"way": way, "seed": seed, "validation": [(10 * number, loss) for number, loss in enumerate(losses)]}


def test_the_summary_pairs_seeds() -> None:
    runs = [_run("fp32 masters", 1, 5.0, 4.5), _run("fp32 masters", 2, 5.0, 4.1)]
    runs += [_run("bf16, nearest", 1, 5.0, 4.7), _run("bf16, nearest", 2, 5.0, 4.9)]
    text = rounding.summary(runs)
    assert "before: 5.00000\n\n| weights |" in text
    assert f"| fp32 masters | 4.30000 (std {0.4 / math.sqrt(2):.5f}) | 1.000 | +0.00000, +0.00000 |" in text
    assert f"| bf16, nearest | 4.80000 (std {0.2 / math.sqrt(2):.5f}) | 0.286 | +0.20000, +0.80000 |" in text


def _command(path: Path, steps: int) -> list[str]:
    sizes = ["--sizes", "tiny", "--layers", "1", "--device", "cpu", "--seeds", "1"]
    return [sys.executable, "-m", "benchmarks.rounding", "--json", str(path), "--steps", str(steps), *sizes]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_curves_are_trained_once(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    for _ in range(2):
        done = subprocess.run(_command(path, 20), cwd=records.ROOT, capture_output=True, text=True, timeout=440)
        assert done.returncode == 0, done.stdout + done.stderr
    runs = records.read(path)
    assert {run["way"] for run in runs} == set(rounding.WAYS)
    assert len(runs) == 3
    assert all([step for step, _ in run["validation"]] == list(range(0, 21, 2)) for run in runs)
    losses = {run["way"]: [loss for _, loss in run["validation"]] for run in runs}
    assert losses["fp32 masters"][-1] < losses["fp32 masters"][0]
    assert "| bf16, stochastic | 1 |" in path.with_suffix(".md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_of_more_than_an_epoch_is_refused_before_it_trains(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    done = subprocess.run(_command(path, 100_000), cwd=records.ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode != 0
    assert "ValueError: --steps 100000 is more than an epoch: " in done.stderr
    assert not (tmp_path / "curves" / "tiny" / "base").exists()
