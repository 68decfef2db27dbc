"""Ctrl-C: the first one saves and stops all ranks after the same step, a second one ends them at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from lightning_ep.checkpoint import files

_JOB = """
    import sys, time
    from pathlib import Path
    from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
    from torch.utils.data import DataLoader
    from lightning_ep import ExpertParallelStrategy
    from tests.tiny import Samples, TinyModule, quiet

    def tell(trainer, *_):
        if trainer.global_step == 2:
            Path(f"going-{trainer.global_rank}").touch()
            if sys.argv[1] == "stuck" and trainer.global_rank == 1:
                time.sleep(90)  # and rank 0 waits for it in an exchange

    callbacks = [LambdaCallback(on_train_batch_end=tell), ModelCheckpoint("saved", every_n_train_steps=10000)]
    strategy = ExpertParallelStrategy(ep=2)
    trainer = quiet(Path("."), strategy=strategy, devices=2, accelerator="cpu", max_epochs=-1, callbacks=callbacks)
    # Its workers get the terminal's Ctrl-C, too.
    trainer.fit(TinyModule(), DataLoader(Samples(64), batch_size=2, num_workers=1))
    raise AssertionError("fit has returned")
"""

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Generator[Start, None, None]:
    """Starts the job in a process group of its own, as a shell does, and waits until both ranks train."""
    (tmp_path / "job.py").write_text(textwrap.dedent(_JOB))
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    jobs: list[subprocess.Popen[bytes]] = []
    with open(tmp_path / "output", "w") as output:

        def start_job(launcher: list[str], what: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, *launcher, "job.py", what]
            job = subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            jobs.append(job)
            while not all((tmp_path / f"going-{rank}").exists() for rank in range(2)):
                assert job.poll() is None, (tmp_path / "output").read_text()
                time.sleep(0.05)
            return job

        yield start_job
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("launcher", "send"),
    [([], os.killpg), pytest.param(TORCHRUN, os.kill, marks=pytest.mark.slow)],
    ids=["a terminal", "torchrun"],
)
def test_the_first_one_saves_and_says_how_to_go_on(
    launcher: list[str], send: Callable[[int, int], None], start: Start, tmp_path: Path
) -> None:
    job = start(launcher, "train")
    send(job.pid, signal.SIGINT)
    code, output = job.wait(60), (tmp_path / "output").read_text()
    saved = tmp_path / "saved" / "last-interrupted.ckpt"
    assert files.damage(saved, files.read_manifest(saved)) == [], output
    assert f"trainer.fit(..., ckpt_path='{saved}')" in output
    assert "fit has returned" not in output
    assert code == 130 or launcher, output  # torchrun reports in its own way


def test_the_second_one_ends_all_at_once_wherever_they_wait(start: Start, tmp_path: Path) -> None:
    job = start([], "stuck")
    time.sleep(1)  # until rank 0 waits
    os.kill(job.pid, signal.SIGINT)
    time.sleep(1.5)
    assert job.poll() is None
    os.kill(job.pid, signal.SIGINT)
    assert job.wait(10) == 130, (tmp_path / "output").read_text()
    deadline = time.monotonic() + 10
    while _alive(job.pid):
        assert time.monotonic() < deadline, "a rank is left"
        time.sleep(0.1)


def _alive(group: int) -> bool:
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, session_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
            states.append(state != "Z" and int(session_group) == group)
    return any(states)
