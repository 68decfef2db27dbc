"""run_ranks: results, failures of every kind, and nothing left behind from one call to the next."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from lightning_ep import layout
from tests.ranks import RankFailure, accelerator, assert_ranks_agree, device, run_ranks


def _all_reduce(offset: torch.Tensor) -> dict[str, object]:
    rank = torch.tensor(float(dist.get_rank()), device=device())
    dist.all_reduce(rank)
    return {"rank": dist.get_rank(), "sum": rank + offset.to(device()), "pid": os.getpid()}


def test_results_come_in_rank_order_with_tensors_on_the_cpu() -> None:
    results = run_ranks(4, _all_reduce, torch.tensor(0.5))
    assert [result["rank"] for result in results] == [0, 1, 2, 3]
    assert all(torch.equal(result["sum"], torch.tensor(6.5)) for result in results)
    assert len({result["pid"] for result in results} | {os.getpid()}) == 5


def test_four_ranks_start_quickly() -> None:
    run_ranks(1, _all_reduce, torch.tensor(0.0))  # the server has its imports behind it now
    start = time.monotonic()
    run_ranks(4, _all_reduce, torch.tensor(0.0))
    assert time.monotonic() - start < 10.0  # about one second on an idle machine


def test_ranks_live_on_with_a_group_of_each_call_alone() -> None:
    first, second = run_ranks(2, _all_reduce, torch.tensor(0.5)), run_ranks(2, _all_reduce, torch.tensor(1.0))
    assert [result["pid"] for result in first] == [result["pid"] for result in second]
    assert [result["sum"] for result in second] == [2.0, 2.0]


def _change(what: str) -> int:
    if what == "surroundings":
        os.environ["ANSWER"] = "42"
        os.chdir("/")
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        random.seed(1)
        layout.ParallelLayout = None  # type: ignore[misc]
        warnings.simplefilter("error")
    elif what == "a thread":
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    elif what == "a process":
        multiprocessing.get_context("spawn").Process(target=time.sleep, args=(1000,)).start()
    return os.getpid()


def _look() -> tuple[int, tuple[Any, ...]]:
    settings = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), random.random()
    signals = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    settings = *settings, layout.ParallelLayout, list(warnings.filters)
    return os.getpid(), (os.environ.get("ANSWER"), os.getcwd(), *settings, signals)


def test_what_a_call_changes_of_its_process_is_put_back() -> None:
    pid, before = run_ranks(1, _look)[0]
    assert run_ranks(1, _change, "surroundings") == [pid]
    assert run_ranks(1, _look) == [(pid, before)]


@pytest.mark.parametrize("what", ["a thread", "a process"])
def test_ranks_that_are_not_alone_in_their_process_any_more_are_replaced(what: str) -> None:
    pid = run_ranks(1, _change, what)[0]
    assert not _is_running(pid)
    assert run_ranks(1, _look)[0][0] != pid


def _differ(wrong: object) -> object:
    return wrong if dist.get_rank() == 1 else []


@pytest.mark.parametrize("wrong", [["loss 1 != 2"], None, True])
def test_what_is_wrong_on_one_rank_is_said_with_it(wrong: object) -> None:
    assert_ranks_agree(2, _differ, [])
    with pytest.raises(AssertionError, match=re.escape(f"rank 1: {wrong}")):
        assert_ranks_agree(2, _differ, wrong)


def _surroundings() -> tuple[str | None, str, int, float, int]:
    threads = len(os.listdir("/proc/self/task"))
    return os.environ.get("ANSWER"), os.getcwd(), torch.get_num_threads(), torch.rand(()).item(), threads


def test_ranks_see_the_environment_and_directory_of_the_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANSWER", "42")
    monkeypatch.chdir(tmp_path)
    results = run_ranks(2, partial(_surroundings), init_process_group=False)
    assert results[0] == results[1]
    answer, directory, torch_threads, _, threads = results[0]
    assert (answer, directory, torch_threads) == ("42", str(tmp_path), 1)
    assert threads == 1, "an import of the fork server started a thread: forking it is not safe"


def _raise_on(failing: int) -> None:
    print(f"rank {dist.get_rank()} prints")
    dist.barrier()  # a rank that fails ends the others wherever they are
    if dist.get_rank() == failing:
        raise ValueError("ep=3 does not divide 4")
    dist.barrier()
    time.sleep(1000)


def test_an_exception_ends_all_ranks_at_once_and_is_shown_with_its_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match="rank 2 of 3 raised ValueError: ep=3 does not divide 4") as info:
        run_ranks(3, _raise_on, 2)
    assert time.monotonic() - start < 20.0
    assert info.value.rank == 2
    assert "in _raise_on" in info.value.errors[2]
    assert info.value.errors[2] in str(info.value)
    assert "rank 1 prints" in str(info.value)


def _hang_on(hanging: int, folder: str) -> None:
    Path(folder, str(dist.get_rank())).write_text(str(os.getpid()))
    if dist.get_rank() == hanging:
        _wait_for_godot(folder)
    dist.barrier()


def _wait_for_godot(folder: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(folder, "child").write_text(str(child.pid))
    child.wait()


def test_a_hang_is_killed_with_every_stack_and_every_process(tmp_path: Path) -> None:
    run_ranks(2, dist.get_rank)  # the time-out begins with ranks that have started
    with pytest.raises(RankFailure, match=r"ranks \[0, 1\] of 2 were still running after 3 s") as info:
        run_ranks(2, _hang_on, 1, str(tmp_path), timeout=3.0)
    assert "in _wait_for_godot" in str(info.value)
    assert "in barrier" in str(info.value)
    _assert_gone(tmp_path, "0", "1", "child")


def _kill_self(folder: str) -> None:
    Path(folder, str(dist.get_rank())).write_text(str(os.getpid()))
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_killed_rank_is_named_as_the_cause(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="rank 1 of 3 was killed by SIGKILL before it returned"):
        run_ranks(3, _kill_self, str(tmp_path))
    _assert_gone(tmp_path, "0", "1", "2")


def _leave() -> None:
    os._exit(0)


def test_a_rank_that_leaves_without_a_result_is_a_failure() -> None:
    with pytest.raises(RankFailure, match="ended with exit code 0 before it returned"):
        run_ranks(1, _leave)


def test_what_cannot_be_pickled_is_refused_in_the_test() -> None:
    with pytest.raises(Exception, match=r"local object|local function"):
        run_ranks(1, lambda: None)


def test_an_interrupt_ends_all_ranks(tmp_path: Path) -> None:
    def interrupt() -> None:
        while not all((tmp_path / name).exists() for name in ("0", "1", "child")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_ranks(2, _hang_on, 1, str(tmp_path))
    _assert_gone(tmp_path, "0", "1", "child")


_KILLED = """
import os, signal, sys, threading, time
from tests.ranks import run_ranks
from tests.test_ranks import _hang_on

def kill(folder):
    while not os.path.exists(os.path.join(folder, "child")):
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    threading.Thread(target=kill, args=sys.argv[1:], daemon=True).start()
    run_ranks(2, _hang_on, 1, sys.argv[1])
"""


@pytest.mark.slow
def test_no_rank_outlives_a_pytest_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], env=environment, check=False)
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)  # what a rank started is its own affair then
    assert done.returncode == -signal.SIGKILL
    _assert_gone(tmp_path, "0", "1")


class _Boring(BoringModel):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(8, 32), batch_size=2)

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()


def _fit(folder: str) -> tuple[int, int, int, float]:
    assert not dist.is_initialized()
    model = _Boring()
    trainer = Trainer(
        accelerator=accelerator(),
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="ddp",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model)
    trainer.validate(model, verbose=False)
    return trainer.global_rank, trainer.world_size, trainer.global_step, model.layer.weight.sum().item()


def test_a_trainer_inside_initialises_the_process_group_itself(tmp_path: Path) -> None:
    results = run_ranks(2, _fit, str(tmp_path), init_process_group=False)
    assert [result[:3] for result in results] == [(0, 2, 2), (1, 2, 2)]
    assert results[0][3] == results[1][3]


def _assert_gone(folder: Path, *names: str) -> None:
    pids = [int((folder / name).read_text()) for name in names]
    deadline = time.monotonic() + 10.0
    while running := [pid for pid in pids if _is_running(pid)]:
        assert time.monotonic() < deadline, f"still running: {running}"
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
