"""`--record`: a run that was cut goes on where it stopped, also where a worker of pytest-xdist died (another cannot
take its place: `--dist loadfile` gives it the same test again, or waits for ever)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_DIES = "import os\ndef test_before(): pass\ndef test_dies():\n    if {dies}: os._exit(3)\ndef test_after(): pass\n"
_PASSES = "import time\nimport pytest\n@pytest.mark.parametrize('i', range(4))\ndef test_passes(i): time.sleep(0.1)\n"


def _run(folder: Path) -> tuple[str, list[dict[str, str]]]:
    """What a run prints, and what it adds to the record."""
    record = folder / "record.jsonl"
    before = len(record.read_text().splitlines()) if record.exists() else 0
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "tests.record", "-n", "2", "--dist", "loadfile"),
            *("--max-worker-restart", "0", "--rootdir", str(folder), "-p", "no:cacheprovider"),
            *(f"--record={record}", str(folder)),
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, cwd=folder, capture_output=True, text=True,
        timeout=90,
    )  # fmt: skip
    return done.stdout + done.stderr, [json.loads(line) for line in record.read_text().splitlines()[before:]]


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_and_the_next_has_what_did_not_pass(tmp_path: Path) -> None:
    (tmp_path / "test_dies.py").write_text(_DIES.format(dies=True))
    for name in "abc":
        (tmp_path / f"test_{name}.py").write_text(_PASSES)
    printed, entries = _run(tmp_path)
    assert "INTERNALERROR" not in printed, printed
    assert "FAILED test_dies.py::test_dies" in printed, printed
    outcomes = {entry["test"]: entry["outcome"] for entry in entries}
    assert outcomes.pop("test_dies.py::test_dies") == "failed"
    assert set(outcomes.values()) == {"passed"}
    assert "1 failed" in printed

    (tmp_path / "test_dies.py").write_text(_DIES.format(dies=False))
    printed, entries = _run(tmp_path)
    again = {entry["test"] for entry in entries}
    assert "test_dies.py::test_dies" in again
    assert again.isdisjoint(outcomes)
    assert len(again) + len(outcomes) == 15
    assert f"{len(again)} passed" in printed
    assert "failed" not in printed
