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
    runs = [_run("bf16, nearest", 2, 5.0, 4.9), _run("bf16, nearest", 1, 5.0, 4.7)]
    runs += [_run("fp32 masters", 1, 5.0, 4.5), _run("fp32 masters", 2, 5.0, 4.1)]
    text = rounding.summary(runs)
    assert "before: 5.00000\n| weights |" in text
    assert f"| fp32 masters | 4.30000 (std {0.4 / math.sqrt(2):.5f}) | 1.000 | +0.00000, +0.00000 |" in text
    assert f"| bf16, nearest | 4.80000 (std {0.2 / math.sqrt(2):.5f}) | 0.286 | +0.20000, +0.80000 |" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_curves_are_trained_once_and_drawn(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "benchmarks.rounding", "curves", "--folder", str(tmp_path), "--device", "cpu"),
        *("--base-steps", "4", "--steps", "10", "--seeds", "1", "--picture", str(tmp_path / "curves.svg")),
    ]
    for ways in (["fp32 masters"], ["fp32 masters", "bf16, stochastic"]):
        done = subprocess.run(
            [*command, "--ways", *ways], cwd=records.ROOT, capture_output=True, text=True, timeout=440
        )
        assert done.returncode == 0, done.stdout + done.stderr
    runs = records.read(tmp_path / "runs.jsonl")
    assert [run["way"] for run in runs] == ["fp32 masters", "bf16, stochastic"]
    assert all([step for step, _ in run["validation"]] == list(range(11)) for run in runs)
    assert all(len(run["train"]) == 10 for run in runs)
    assert runs[0]["validation"][-1][1] < runs[0]["validation"][0][1]
    assert "| bf16, stochastic |" in done.stdout
    assert "minus that of fp32 masters" in (tmp_path / "curves.svg").read_text()
