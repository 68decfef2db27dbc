"""Weights and train states go to the disk and come back: the command checks itself that they are what they were."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import records


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("what", "figures"),
    [
        (["weights"], {"save, GB/s", "cold read, GB/s", "cold load, GB/s", "warm load, GB/s"}),
        (["checkpoints"], {"at once, s", "resume, s", "async, first wait, s", "async, wait, s", "share of waiting"}),
        (["checkpoints", "--bf16-weights"], {"at once, s", "resume, s"}),
        (["whole-way", "--tokens", "2x32"], {"load, s", "train, s", "export, s", "read by transformers, s", "step, s"}),
    ],
)
def test_disk_is_measured_and_left_as_it_was(what: list[str], figures: set[str], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path, disk = tmp_path / "records" / "disk.jsonl", tmp_path / "disk"
    options = ["--directory", str(disk), "--json", str(path), "--sizes", "tiny", "--layers", "2", "--device", "cpu"]
    command = [*torchrun, "-m", "benchmarks.disk", *what, *options]
    done = subprocess.run(command, cwd=records.ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = records.read(path)
    assert figures < record["rows"][0].keys()
    assert all(float(value) > 0 for value in record["rows"][0].values())
    assert record["title"] == f"{what[0]}, 2 layers of tiny, 2 ranks"
    assert record["command"].startswith(f"torchrun --nproc-per-node 2 -m benchmarks.disk {what[0]}")
    assert list(disk.iterdir()) == []
