"""A failure on one rank ends the job on all of them, quickly, and says where each stood."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_ep import CheckpointError, ExpertParallelStrategy
from lightning_ep.distributed import apart
from lightning_ep.distributed.progress import Progress
from tests.ranks import RankFailure, device, run_ranks
from tests.tiny import Samples, TinyModule, quiet

_SCRIPT = """
    import os, sys, time
    from pathlib import Path
    from torch.utils.data import DataLoader
    from lightning_ep import ExpertParallelStrategy
    from tests.tiny import Samples, TinyModule, quiet

    class Module(TinyModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                if self.global_rank == int(sys.argv[1]):
                    raise ValueError("planted")
                # As a GPU's rank, which does not see a peer leave: it waits until the time-out.
                time.sleep(90)
            return super().training_step(batch, batch_idx)

    print("pid", os.getpid(), flush=True)
    quiet(Path("."), strategy=ExpertParallelStrategy(ep=2), devices=2, accelerator="cpu", max_steps=4).fit(
        Module(), DataLoader(Samples(16), batch_size=2)
    )
"""


def _run(tmp_path: Path, launcher: list[str], rank: int) -> tuple[int, str, float]:
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(_SCRIPT))
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    # One file for everybody's output: a pipe would stay open as long as any orphan.
    with open(tmp_path / "output", "w+") as output:
        job = subprocess.run(
            [*launcher, str(script), str(rank)], stdout=output, stderr=subprocess.STDOUT, env=environment,
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


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [
        pytest.param(LIGHTNING, 0, marks=pytest.mark.slow),
        (LIGHTNING, 1),
        pytest.param(TORCHRUN, 1, marks=pytest.mark.slow),
    ],
    ids=["lightning-0", "lightning-1", "torchrun"],
)
def test_an_exception_on_one_rank_ends_all(tmp_path: Path, launcher: list[str], rank: int) -> None:
    code, output, seconds = _run(tmp_path, launcher, rank)
    assert code != 0
    assert "ValueError: planted" in output, output
    assert seconds < 30 + 25, "start-up included"
    pids = [int(line.split()[1]) for line in output.splitlines() if line.startswith("pid ")]
    assert len(pids) == 2, output
    deadline = time.monotonic() + 10
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in pids if _alive(pid)]


class _Sleeping(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and batch_idx == 1:
            time.sleep(60)
        return super().training_step(batch, batch_idx)


def _sleep_on_one_rank(root: Path) -> None:
    strategy = ExpertParallelStrategy(ep=4, timeout=timedelta(seconds=4))
    quiet(root, strategy=strategy, max_steps=4).fit(_Sleeping(), DataLoader(Samples(32), batch_size=2))


def test_a_time_out_says_layer_direction_and_step(tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(4, _sleep_on_one_rank, tmp_path, init_process_group=False, timeout=40)
    # The first rank that times out leaves, and its peers may see a broken connection instead; all say where they were.
    lines = [line for line in str(failure.value).splitlines() if re.match(r"\[rank \d\] \w+ while ", line)]
    assert lines, str(failure.value)
    for line in lines:
        assert "layer model.model.layers.0.mlp.experts" in line
        assert "training step 1" in line
        # Where the rank waits for FSDP's gather instead, the line names the last exchange that came through.
        assert any(word in line for word in ("forward", "backward", "exchange of counts"))


def _watch(late: float, timeout: float) -> str:
    """What the thread that stands in for NCCL's silent abort prints on this rank, if rank 1 comes ``late``."""
    progress, rows = Progress(), torch.ones(2, device=device())
    progress.step = "training step 7"
    lines = io.StringIO()
    with contextlib.redirect_stderr(lines):
        progress.watch(dist.get_rank(), timeout_s=timeout)
        if dist.get_rank() == 1:
            time.sleep(late)
        work = dist.all_to_all_single(torch.empty_like(rows), rows, async_op=True)
        progress.started("layers.3", "combine, backward", work)
        work.wait()
        time.sleep(0.5)
        progress.close()
    return lines.getvalue()


def test_the_watch_speaks_before_an_exchange_times_out() -> None:
    waiting, sleeping = run_ranks(2, _watch, 2.5, 1.0)
    assert re.fullmatch(
        r"\[rank 0\] waiting for the combine, backward of layer layers.3, training step 7, started \d s ago\n", waiting
    )
    assert sleeping == ""
    assert run_ranks(2, _watch, 0.0, 60.0) == ["", ""]


def test_the_watch_ends_with_the_run_that_it_watches() -> None:
    before = threading.active_count()
    progress = Progress()
    progress.watch(0, timeout_s=0.4)
    assert threading.active_count() == before + 1
    del progress
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _slow_step() -> float:
    """Seconds for which a rank is said to stand in one step of many exchanges."""
    apart._INTERVAL = 0.1  # in which it has gone on, whenever it is looked at
    progress = Progress()
    watch = apart.Watch(progress)
    for _ in range(25):
        with progress.blocking("layers.3", "dispatch"):
            time.sleep(0.04)
    return time.monotonic() - watch._since


def test_a_rank_that_goes_on_in_a_long_step_does_not_stand() -> None:
    assert run_ranks(1, _slow_step)[0] < 0.5


class _OnOneRank(TinyModule):
    """Does on rank 0 alone what is for all ranks, after its second step."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step != 2 or self.global_rank != 0:
            return
        if self.what == "save":
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "mine.ckpt")
        elif self.what == "log":
            self.log("mine", 1.0, sync_dist=True)
        elif self.what == "generate":
            self.model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3)
        else:
            time.sleep(3)


def _on_one_rank(root: Path, what: str, ep: int) -> int:
    apart._PATIENCE, apart._INTERVAL, apart._WARN_AFTER = 0.8, 0.2, 1.5
    trainer = quiet(root, strategy=ExpertParallelStrategy(ep=ep), max_steps=4)
    trainer.fit(_OnOneRank(what), DataLoader(Samples(16), batch_size=2))
    return trainer.global_step


@pytest.mark.parametrize(
    ("what", "ep", "line"),
    [
        ("save", 2, 'self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "mine.ckpt")'),
        ("log", 2, 'self.log("mine", 1.0, sync_dist=True)'),
        ("generate", 2, "self.model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3)"),
        ("generate", 1, "self.model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3)"),
    ],
)
def test_what_one_rank_does_alone_is_named_with_its_line(tmp_path: Path, what: str, ep: int, line: str) -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(2, _on_one_rank, tmp_path, what, ep, init_process_group=False, timeout=40)
    message = str(failure.value)
    assert re.search(
        rf"rank 0: .*test_failures.py:\d+ in on_train_batch_end: `{re.escape(line)}` \(training step 1\)", message
    )
    assert re.search(r"rank 1: .*\(training step 2\)", message), message
    assert "take the line out of `if self.global_rank == 0`" in message
    assert "were still running" not in message


def test_a_rank_that_is_slow_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(2, _on_one_rank, tmp_path, "sleep", 2, init_process_group=False, timeout=40) == [4, 4]
    output = capfd.readouterr().out
    assert re.search(
        r"Ranks 1 have waited for others for \d s.*\n  rank 0: .*`time.sleep\(3\)` \(training step 1\)", output
    )


def _saves_after_the_other_has_gone(root: Path) -> None:
    trainer = quiet(root, max_steps=1)
    trainer.fit(TinyModule(), DataLoader(Samples(16), batch_size=2))
    if trainer.is_global_zero:
        with pytest.raises(CheckpointError, match=r"another rank has left.*for all ranks: take the call out"):
            trainer.save_checkpoint(root / "mine.ckpt")


def test_a_checkpoint_of_one_rank_at_the_end_says_why_there_is_none(tmp_path: Path) -> None:
    run_ranks(2, _saves_after_the_other_has_gone, tmp_path, init_process_group=False, alone=True, timeout=40)
