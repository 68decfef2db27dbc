"""The script that takes a model at full size the whole way does so at a tiny one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY


@pytest.mark.slow
def test_a_tiny_model_goes_the_whole_way(tmp_path: Path) -> None:
    """It raises itself where an export or a resumed run is not what was trained."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "benchmarks.whole_way",
        "--directory", str(tmp_path), "--sizes", "tiny", "--layers", "3", "--state-layers", "2", "--tokens", "2x32",
        "--steps", "3", "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ranks"] == 2
    assert {"write_s", "load_s", "train_s", "export_s", "read_by_transformers_s", "save_s", "resume_s"} <= found.keys()
    assert not list(tmp_path.iterdir())
