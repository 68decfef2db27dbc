"""A failure on one rank ends the job on all of them, quickly, and says where each stood."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

_SCRIPT = """
    import os, sys, time
    from datetime import timedelta
    from pathlib import Path
    from torch.utils.data import DataLoader
    from lightning_ep import ExpertParallelStrategy
    from tests.tiny import Samples, TinyModule, quiet

    failing, what = int(sys.argv[1]), sys.argv[2]

    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            if self.global_rank == failing and batch_idx == 1:
                if what == "raise":
                    raise ValueError("planted")
                time.sleep(60)
            return super().training_step(batch, batch_idx)

    print("pid", os.getpid(), flush=True)
    timeout = timedelta(seconds=5 if what == "sleep" else 600)
    strategy = ExpertParallelStrategy(ep=2, timeout=timeout)
    quiet(Path("."), strategy=strategy, devices=2, accelerator="cpu", max_steps=4).fit(
        Module(), DataLoader(Samples(16), batch_size=2)
    )
"""


def _run(tmp_path: Path, launcher: list[str], rank: int, what: str) -> tuple[int, str, float]:
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(_SCRIPT))
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    # One file for everybody's output: a pipe would stay open as long as any orphan.
    with open(tmp_path / "output", "w+") as output:
        job = subprocess.run(
            [*launcher, str(script), str(rank), what], stdout=output, stderr=subprocess.STDOUT, env=environment,
            timeout=100, cwd=tmp_path,
        )  # fmt: skip
        output.seek(0)
        return job.returncode, output.read(), time.monotonic() - start


LIGHTNING = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("launcher", [LIGHTNING, TORCHRUN], ids=["lightning", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_ends_all(tmp_path: Path, launcher: list[str], rank: int) -> None:
    code, output, seconds = _run(tmp_path, launcher, rank, "raise")
    assert code != 0
    assert "ValueError: planted" in output, output
    assert seconds < 30 + 25, "start-up included"
    pids = [int(line.split()[1]) for line in output.splitlines() if line.startswith("pid ")]
    assert len(pids) == 2, output
    deadline = time.monotonic() + 10
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in pids if _alive(pid)]


def test_a_time_out_says_layer_direction_and_step(tmp_path: Path) -> None:
    code, output, _ = _run(tmp_path, TORCHRUN, 1, "sleep")
    assert code != 0
    line = next((line for line in output.splitlines() if line.startswith("[rank 0]")), output)
    assert "layer model.model.layers.0.mlp.experts" in line
    assert "training step 1" in line
    # Where the rank waits for FSDP's gather instead, the line names the last exchange that came through.
    assert any(word in line for word in ("forward", "backward", "exchange of counts"))
