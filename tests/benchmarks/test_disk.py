"""Weights and train states go to the disk and come back: the command checks itself that they are what they were."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import disk, records

SAVES = ["save at once", "model and resume, same loss"]
WHOLE_WAY = ["save", "cold load, model and optimizer", "4 steps", "export", "a layer read by transformers, equal"]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("what", "stages"),
    [
        (["weights"], ["save", "cold read", "cold load", "warm read", "warm load"]),
        (["checkpoints"], [*SAVES, "async save, first wait", "async save, wait", "async save, in all"]),
        (["checkpoints", "--bf16-weights", "--steps", "2"], SAVES),
        (["whole-way", "--tokens", "2x32"], WHOLE_WAY),
    ],
)
def test_disk_is_measured_and_left_as_it_was(what: list[str], stages: list[str], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path, folder = tmp_path / "records" / "disk.jsonl", tmp_path / "disk"
    options = ["--directory", str(folder), "--json", str(path), "--sizes", "tiny", "--layers", "2", "--device", "cpu"]
    command = [*torchrun, "-m", "benchmarks.disk", *what, *options]
    (folder / "benchmarks-disk" / "hub").mkdir(parents=True)  # of a run that was killed
    done = subprocess.run(command, cwd=records.ROOT, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = records.read(path)
    assert [row["stage"] for row in record["rows"]] == stages
    for row in record["rows"]:
        assert float(row["s"]) > 0
        assert float(row["host peak GiB"]) > 0
        assert f"stage {row['stage']}, s {row['s']}" in done.stdout
    assert record["title"] == f"{what[0]}, 2 layers of tiny, 2 ranks"
    assert record["command"].startswith(f"torchrun --nproc-per-node 2 -m benchmarks.disk {what[0]}")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "free_gb", "fit"),
    [
        ("whole-way --layers 48", 130, 48),  # 61 GB
        ("whole-way --layers 48", 50, 37),
        ("checkpoints --layers 48 --bf16-weights --steps 2", 130, 32),  # one state of 3.7 GB a layer
        ("checkpoints --layers 48 --bf16-weights --steps 3", 130, 15),  # the second is written beside the first
        ("checkpoints --layers 12", 130, 7),
    ],
)
def test_more_layers_than_the_disk_holds_are_left_out(
    options: str, free_gb: int, fit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parsed = disk.parse([*options.split(), "--directory", str(tmp_path)])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gb * 10**9))
    assert disk.layers_that_fit(parsed) == (fit, free_gb * 10**9)


def test_a_training_too_short_for_what_it_measures_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        disk.parse(["checkpoints", "--directory", "/tmp", "--steps", "2"])
    assert "--steps 2: checkpoints takes 3 or more" in capsys.readouterr().err
