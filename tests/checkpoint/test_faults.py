"""Ranks that are killed, disks that are full, signals at random moments: a checkpoint is there in full or not at all.

The short form runs always. `pytest -m fault_injection tests/checkpoint/test_faults.py` runs 20 kills and 20 signals.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_ep import ExpertParallelStrategy
from lightning_ep.checkpoint import files
from lightning_ep.checkpoint.saved_weights import open_verified
from lightning_ep.hub.errors import CheckpointError
from tests.ranks import RankFailure, run_ranks
from tests.tiny import TinyModule, loader, quiet

fault_injection = pytest.mark.fault_injection


class _Module(TinyModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class _AfterSave(L.Callback):
    """Calls a function once, on a thread, some seconds after the training has reached a step."""

    def __init__(self, step: int, seconds: float, function: Any) -> None:
        self.step, self.timer = step, threading.Timer(seconds, function)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # Once: several batches may end in one step, and a second signal may come when the first has ended the run.
        if trainer.global_step == self.step and self.timer.ident is None:
            self.timer.start()


def _keep(root: Path, link: bool) -> ModelCheckpoint:
    return ModelCheckpoint(
        root / "saved", filename="{step}", every_n_train_steps=1, save_top_k=1, save_last="link" if link else True
    )


def _trainer(root: Path, keep: ModelCheckpoint, asynchronous: bool, **arguments: Any) -> L.Trainer:
    strategy = ExpertParallelStrategy(ep=2, async_save=asynchronous)
    callbacks = [*arguments.pop("callbacks", []), keep]
    return quiet(root, strategy=strategy, callbacks=callbacks, **arguments)


# ---------------------------------------------------------------------------------------------------- kill -9


def _train_until_killed(root: Path, victims: list[int], seconds: float, link: bool, options: dict[str, bool]) -> None:
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    rank = int(os.environ["RANK"])
    keep = _keep(root, link)
    first = _AfterSave(_step_of_last(root) + 1, seconds, kill if rank in victims else int)
    strategy = ExpertParallelStrategy(ep=2, **options)
    trainer = quiet(root, strategy=strategy, callbacks=[first, keep], max_epochs=-1)
    trainer.fit(_Module(), loader(64), ckpt_path="last")


def _step_of_last(root: Path) -> int:
    """The step of the checkpoint that ``ckpt_path="last"`` takes; every visible checkpoint must be whole."""
    steps = [0]
    for path in (root / "saved").glob("*.ckpt"):
        assert path.exists(), f"{path} is a link to nothing"
        whole = open_verified(path)
        if path.name.startswith("last"):
            meta = whole / files.META if whole.is_dir() else whole
            steps.append(torch.load(meta, weights_only=True)["global_step"])
    return max(steps)


def _resume(root: Path, link: bool) -> int:
    trainer = _trainer(root, _keep(root, link), False, max_steps=_step_of_last(root) + 2, max_epochs=-1)
    trainer.fit(_Module(), loader(64), ckpt_path="last")
    return trainer.global_step


def _kill_repeatedly(root: Path, kills: int, generator: random.Random) -> None:
    progress = 0
    for kill in range(kills):
        victims = [[0], [1], [0, 1]][kill % 3]
        link = kill % 2 == 0
        options = {"async_save": kill % 4 >= 2, "save_distributed_checkpoint": kill % 5 < 3}
        seconds = generator.uniform(0.0, 0.6)
        case = f"kill {kill}: ranks {victims} after {seconds:.3f} s, link={link}, {options}"
        with pytest.raises(RankFailure, match="was killed by SIGKILL"):
            run_ranks(
                2, _train_until_killed, root, victims, seconds, link, options, init_process_group=False, timeout=60
            )
        step = _step_of_last(root)
        print(f"{case}: step {step}; {sorted(path.name for path in (root / 'saved').iterdir())}")
        assert step >= progress, case
        progress = step
    assert progress >= kills // 2
    assert run_ranks(2, _resume, root, True, init_process_group=False) == [progress + 2] * 2


def test_a_killed_rank_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    _kill_repeatedly(tmp_path, 3, random.Random(0))


@fault_injection
@pytest.mark.timeout(600)
def test_20_kills_leave_a_checkpoint_each_time(tmp_path: Path) -> None:
    _kill_repeatedly(tmp_path, 20, random.Random(1))


# ---------------------------------------------------------------------------------------------------- a full disk


@contextlib.contextmanager
def _small_files(size: int) -> Any:
    """Writing more than ``size`` bytes to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _leads_to(link: Path, name: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(link) == name
    return False


def _full_disk(root: Path, distributed: bool, asynchronous: bool, rank: int) -> dict[str, Any]:
    class Fill(L.Callback):
        def __init__(self) -> None:
            self.limit = contextlib.ExitStack()

        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2 and dist.get_rank() == rank:
                # The save before may still be writing, and rank 0 be between the old link and the new one.
                while not _leads_to(root / "saved" / "last.ckpt", "step=2.ckpt"):
                    time.sleep(0.01)
                self.limit.enter_context(_small_files(20_000))

    fill = Fill()
    module, keep = _Module(), _keep(root, link=True)
    strategy = ExpertParallelStrategy(ep=2, save_distributed_checkpoint=distributed, async_save=asynchronous)
    trainer = quiet(root, strategy=strategy, callbacks=[fill, keep], max_steps=5)
    with pytest.raises(CheckpointError) as caught:
        trainer.fit(module, loader(64))
    fill.limit.close()
    found = sorted(path.name for path in (root / "saved").iterdir())
    trainer.save_checkpoint(root / "elsewhere.ckpt")
    again = quiet(root, max_steps=6)
    again.fit(_Module(), loader(64), ckpt_path=root / "elsewhere.ckpt")
    return {
        "message": str(caught.value), "found": found, "last": os.readlink(root / "saved" / "last.ckpt"),
        "steps": (trainer.global_step, again.global_step),
    }  # fmt: skip


@pytest.mark.parametrize(("distributed", "asynchronous"), [(True, False), (True, True), (False, False), (False, True)])
def test_a_full_disk_stops_with_everything_kept(tmp_path: Path, distributed: bool, asynchronous: bool) -> None:
    rank = 1 if distributed else 0
    one, other = run_ranks(2, _full_disk, tmp_path, distributed, asynchronous, rank, init_process_group=False)
    assert one["message"] == other["message"]
    assert f"rank {rank}: OSError: [Errno 27] File too large" in one["message"], one["message"]
    assert f"{tmp_path}/saved/step=3.ckpt could not be saved" in one["message"]
    assert "MiB were free in" in one["message"] or "GiB were free in" in one["message"]
    # Nothing half-written, and the deletion that was to follow the save has not happened.
    assert one["found"] == ["last.ckpt", "step=2.ckpt"]
    assert one["last"] == "step=2.ckpt"
    assert one["steps"] == (4 if asynchronous else 3, 6)


# ---------------------------------------------------------------------------------------------------- asynchronous


def _save_behind(root: Path) -> dict[str, Any]:
    """Saves in every step while the weights change, and compares with what was saved at once."""
    states: dict[str, dict[str, torch.Tensor]] = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            weights = {name: p.full_tensor().clone() for name, p in module.named_parameters()}
            states[f"step={trainer.global_step}.ckpt"] = weights

    keep = ModelCheckpoint(root / "behind", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = _trainer(root, keep, True, callbacks=[Watch()], max_steps=4)
    trainer.fit(_Module(), loader(64))
    wrong = []
    for name, expected in states.items():
        module = _Module()
        quiet(root, max_steps=1).validate(module, loader(2), ckpt_path=root / "behind" / name, verbose=False)
        wrong += [
            (name, key) for key, p in module.named_parameters() if not torch.equal(p.full_tensor(), expected[key])
        ]
    return {"wrong": wrong, "names": sorted(states)}


def test_a_checkpoint_written_behind_holds_the_weights_of_its_step(tmp_path: Path) -> None:
    (found, _) = run_ranks(2, _save_behind, tmp_path, init_process_group=False)
    assert found["wrong"] == []
    assert found["names"] == [f"step={step}.ckpt" for step in (1, 2, 3, 4)]


def _same_name(root: Path) -> list[str]:
    keep = ModelCheckpoint(root / "same", filename="best", monitor="step", mode="max", save_top_k=2,
                           every_n_train_steps=1)  # fmt: skip
    _trainer(root, keep, True, max_steps=2).fit(_Module(), loader(64))
    return sorted(path.name for path in (root / "same").iterdir())


def test_a_name_that_is_being_written_is_taken(tmp_path: Path) -> None:
    assert run_ranks(2, _same_name, tmp_path, init_process_group=False)[0] == ["best-v1.ckpt", "best.ckpt"]


def _one_name(root: Path) -> list[str]:
    moved = files.point

    def slowly(link: Path, target: Path) -> None:
        time.sleep(0.5)  # of rank 0 alone, which is busy for longer than the other
        moved(link, target)

    files.point = slowly
    keep = ModelCheckpoint(root / "one", filename="model", save_last="link", every_n_train_steps=1)
    _trainer(root, keep, True, max_steps=4).fit(_Module(), loader(64))
    return sorted(path.name for path in (root / "one").iterdir())


def test_every_save_replaces_the_one_before(tmp_path: Path) -> None:
    """Ranks asked whether a name is taken, or not, by whether their own thread was done."""
    one, other = run_ranks(2, _one_name, tmp_path, init_process_group=False)
    assert one == other
    assert "last.ckpt" in one


# ---------------------------------------------------------------------------------------------------- signals


def _stop_by_signal(root: Path, rounds: list[tuple[int, float]], asynchronous: bool) -> list[int]:
    """Signals one rank per round at a moment of its own, and resumes; returns the step of every round."""
    steps = []
    for victim, seconds in rounds:

        def signal_us(victim: int = victim) -> None:
            if dist.get_rank() == victim:
                os.kill(os.getpid(), signal.SIGTERM)

        keep = ModelCheckpoint(root / "saved", filename="{step}", every_n_train_steps=50, save_last=True)
        start = _AfterSave((steps[-1] if steps else 0) + 1, seconds, signal_us)
        trainer = _trainer(root, keep, asynchronous, callbacks=[start], max_epochs=-1, accumulate_grad_batches=2)
        with pytest.raises(SIGTERMException):
            trainer.fit(_Module(), loader(64), ckpt_path="last")
        assert trainer.received_sigterm
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        steps.append(trainer.global_step)
        saved = torch.load(root / "saved" / "last-sigterm.ckpt" / files.META, weights_only=True)
        assert saved["global_step"] == trainer.global_step
    return steps


def _check_signals(root: Path, count: int, generator: random.Random) -> None:
    rounds = [(generator.randrange(2), generator.uniform(0.0, 0.5)) for _ in range(count)]
    half = max(1, count // 2)
    for part, asynchronous in ((rounds[:half], False), (rounds[half:], True)):
        place = root / str(asynchronous)
        one, other = run_ranks(2, _stop_by_signal, place, part, asynchronous, init_process_group=False, timeout=200)
        assert one == other
        assert one == sorted(set(one)), "every round goes on where the one before stopped"


def test_a_signal_on_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    _check_signals(tmp_path, 3, random.Random(0))


@fault_injection
@pytest.mark.timeout(600)
def test_20_signals_at_random_moments(tmp_path: Path) -> None:
    _check_signals(tmp_path, 20, random.Random(1))


_JOB = """
    from pathlib import Path
    from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
    from lightning_ep import ExpertParallelStrategy
    from tests.tiny import TinyModule, loader, quiet

    def tell(trainer, *_):
        if trainer.global_step == 3:
            Path(f"going-{trainer.global_rank}").touch()

    keep = ModelCheckpoint("saved", every_n_train_steps=10000, save_last=True)
    callbacks = [LambdaCallback(on_train_batch_end=tell), keep]
    strategy = ExpertParallelStrategy(ep=2)
    quiet(Path("."), strategy=strategy, devices=2, accelerator="cpu", max_epochs=-1, callbacks=callbacks).fit(
        TinyModule(), loader(64), ckpt_path="last"
    )
"""


_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.parametrize(
    "launcher", [[], pytest.param(_TORCHRUN, marks=pytest.mark.slow)], ids=["lightning", "torchrun"]
)
def test_a_terminated_job_saves_and_ends_as_a_whole(tmp_path: Path, launcher: list[str]) -> None:
    (tmp_path / "job.py").write_text(textwrap.dedent(_JOB))
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "output", "w+") as output:
        job = subprocess.Popen(
            [sys.executable, *launcher, "job.py"], cwd=tmp_path, env=environment, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            while not all((tmp_path / f"going-{rank}").exists() for rank in range(2)):
                assert job.poll() is None, (tmp_path / "output").read_text()
                time.sleep(0.05)
            job.send_signal(signal.SIGTERM)
            code = job.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    saved = tmp_path / "saved" / "last-sigterm.ckpt"
    assert files.damage(saved, files.read_manifest(saved)) == []
    # torchrun forwards the signal and reports it itself.
    assert code == 0 or launcher, (tmp_path / "output").read_text()


def _requeue(root: Path, resume: str | None) -> tuple[int, int]:
    rank = os.environ["RANK"]
    slurm = {"JOB_ID": "4711", "JOB_NAME": "train", "NTASKS": "2", "NTASKS_PER_NODE": "2", "PROCID": rank,
             "LOCALID": rank, "NODEID": "0"}  # fmt: skip
    os.environ.update({f"SLURM_{name}": value for name, value in slurm.items()})
    os.environ["PATH"] = f"{root}:{os.environ['PATH']}"
    os.environ.pop("SLURM_ARRAY_JOB_ID", None)

    def signal_us() -> None:
        if rank == "1":
            os.kill(os.getpid(), signal.SIGUSR1)

    def trainer(**arguments: Any) -> L.Trainer:
        strategy = ExpertParallelStrategy(ep=2, async_save=True)
        plugin = SLURMEnvironment(auto_requeue=True)
        keep = [ModelCheckpoint(root / "saved", every_n_train_steps=10000, save_last="link")] if resume else []
        callbacks = [*arguments.pop("callbacks", []), *keep]
        return quiet(root / "job", strategy=strategy, plugins=[plugin], max_epochs=-1, callbacks=callbacks, **arguments)

    first = trainer(callbacks=[_AfterSave(2, 0.05, signal_us)])
    with pytest.raises(SIGTERMException):
        first.fit(_Module(), loader(64), ckpt_path=resume)
    second = trainer(max_steps=first.global_step + 1)
    second.fit(_Module(), loader(64), ckpt_path=resume)
    assert len(second.strategy.lightning_module.losses) == 1, "it began anew"
    return first.global_step, second.global_step


@pytest.mark.parametrize("resume", [None, "last"])
def test_slurm_requeues_once_and_the_next_start_goes_on(tmp_path: Path, resume: str | None) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" $(ls {tmp_path}/job) >> {tmp_path}/calls\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    (first, second), other = run_ranks(2, _requeue, tmp_path, resume, init_process_group=False)
    assert (first, second) == other
    assert second == first + 1
    # Called after the checkpoint was there in full, by one rank.
    assert (tmp_path / "calls").read_text() == "requeue 4711 hpc_ckpt_1.ckpt\n"
