"""Runs a function on several ranks, each its own process, in a tenth of a second.

```python
from tests.ranks import device, run_ranks

def _sum_of_ranks(scale):  # a module-level function: it is pickled by name
    total = torch.tensor(float(dist.get_rank() * scale), device=device())
    dist.all_reduce(total)
    return total.item()

def test_sum():
    assert run_ranks(4, _sum_of_ranks, 2) == [12.0] * 4
```

The ranks are forked from one server process that has the slow imports behind it, and live until the module has had its
tests: the next call with as many ranks finds them with the caches of the last one, and otherwise as if they were new
(`tests/rank_process.py`). Where a rank fails, all are replaced. With LIGHTNING_EP_TEST_DEVICE=cuda they use NCCL,
several ranks per GPU where there are fewer GPUs than ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.forkserver
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CUDAAccelerator

from tests import rank_process
from tests.rank_process import device as device  # what tests import with `run_ranks`
from tests.rank_process import on_cuda
from tests.shared_gpus import SharedGPUs

REPOSITORY = Path(__file__).resolve().parents[1]
_OUTPUT_LINES = 200


class RankFailure(Exception):
    """A rank raised, died or hung. The message has the traceback and the output of every rank, the cause first.

    Attributes:
        rank: The rank that failed first.
        errors: The traceback of every rank that raised, by rank.
    """

    def __init__(self, rank: int, summary: str, errors: dict[int, str], outputs: dict[int, str]) -> None:
        self.rank = rank
        self.errors = errors
        parts = [summary]
        for other in sorted(outputs, key=lambda other: other != rank):
            parts += [f"----- rank {other}: output -----", outputs[other]] if outputs[other] else []
            parts += [f"----- rank {other}: exception -----", errors[other]] if other in errors else []
        super().__init__("\n".join(parts))


def here(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch on this rank's device."""
    return {key: value.to(device()) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def accelerator() -> str | CUDAAccelerator:
    """What to give to ``Trainer(accelerator=...)`` so that it trains on `device`."""
    return _SharedCUDAAccelerator() if on_cuda() else "cpu"


_CLEANING = 20.0  # seconds for a rank to put back what a call has changed
_SLOWER_ON_GPU = 3  # every training makes communicators of its own, and ranks that share a GPU take turns


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    init_process_group: bool = True,
    alone: bool = False,
    timeout: float = 90.0,
) -> list[Any]:
    """Calls ``function(*args)`` on every rank, with the environment and working directory of the caller.

    Every rank starts from the same random seed and prints into this process's stdout when all have ended.

    Args:
        world_size: Number of ranks.
        function: A function of a module. It learns its rank from `torch.distributed` or the environment variables
            that torchrun sets.
        args: What to call it with; every rank gets its own copy.
        init_process_group: Whether to initialise the default process group. Without it the variables are still there:
            ``Trainer(devices=world_size, accelerator=accelerator())`` in ``function`` initialises the group itself.
        alone: Whether the ranks are processes of this call only, each of which ends when ``function`` has returned. On
            GPUs, others have a process group from the first call on.
        timeout: Seconds after which ranks that still run are killed; on GPUs three times as many.

    Returns:
        What ``function`` returned, by rank; tensors on the CPU.

    Raises:
        RankFailure: If a rank raised, died or was still running after ``timeout``. No rank outlives such a call.
    """
    # The store lives here, as it does in torchrun's agent: its port cannot be taken before the ranks connect.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    crew = (None if alone else _crews.pop(world_size, None)) or _Crew(world_size, start_fork_server())
    environments = [{**rank, **crew.gpus.environment} for rank in rank_environments(world_size, store.port)]
    call = (function, args, init_process_group, environments, os.getcwd())
    crew.stores.append(store)
    try:
        results = crew.call(call, alone, timeout * (_SLOWER_ON_GPU if on_cuda() else 1))
    except BaseException:
        crew.dismiss()
        raise
    if crew.reusable:
        _crews[world_size] = crew
    else:
        crew.dismiss()
    return results


def assert_ranks_agree(world_size: int, function: Callable[..., list[str]], *args: Any, **options: Any) -> None:
    """Calls a function that returns what is wrong on every rank, as `run_ranks` does; nothing may be wrong on any.

    A rank that returns anything but a list has not looked, and fails too.
    """
    answers = run_ranks(world_size, function, *args, **options)
    assert len(answers) == world_size
    wrong = {rank: answer for rank, answer in enumerate(answers) if not isinstance(answer, list) or answer}
    assert not wrong, "\n".join(f"rank {rank}: {answer}" for rank, answer in wrong.items())


def dismiss_ranks() -> None:
    """Ends the ranks that wait for calls; the next call starts new ones."""
    while _crews:
        _crews.popitem()[1].dismiss()


atexit.register(dismiss_ranks)  # before multiprocessing, which would wait for them


@functools.cache
def start_fork_server() -> multiprocessing.context.ForkServerContext:
    """Starts the server, without waiting for its imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded", "tests.ranks"])
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        multiprocessing.forkserver.ensure_running()
    return context


class _Crew:
    """Processes of one world size that serve one call after another, until one of them fails."""

    def __init__(self, world_size: int, server: multiprocessing.context.ForkServerContext) -> None:
        self.world_size = world_size
        self.reusable = True
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.gpus = SharedGPUs(needed=on_cuda() and torch.cuda.device_count() < world_size)
        self.processes: list[Any] = []
        self.pipes: list[multiprocessing.connection.Connection] = []
        self.stores: list[dist.TCPStore] = []  # of every call: that of the first one may be used by all
        for rank in range(world_size):
            ours, theirs = multiprocessing.Pipe()
            process = server.Process(target=rank_process.main, args=(theirs, rank), name=f"rank {rank}")
            self.processes.append(process)
            self.pipes.append(ours)
            process.start()
            theirs.close()

    def call(self, call: Any, alone: bool, timeout: float) -> list[Any]:
        """What the function returned on every rank."""
        self._forget_last_call()
        torch.save(call, self.folder / "call")
        deadline = time.monotonic() + timeout
        self._tell_all((str(self.folder), alone))
        self._hear_all(deadline, timeout)
        self._tell_all("all have returned")
        self.reusable = all(self._hear_all(deadline + _CLEANING, timeout))
        print(self._outputs(), end="")
        files = [self.folder / f"{rank}.result" for rank in range(self.world_size)]
        return [torch.load(file, map_location="cpu", weights_only=False) for file in files]

    def _tell_all(self, what: Any) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # it has died, which is seen when it should answer
                pipe.send(what)

    def _forget_last_call(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def _hear_all(self, deadline: float, timeout: float) -> list[bool]:
        answers: dict[int, bool | None] = {}
        running: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        while running:
            heard = self._hear(running, max(0.0, deadline - time.monotonic()))
            if not heard:
                self._fail_hanging(sorted(running.values()), timeout)
            if None in heard.values():
                # The peers of a rank that died fail too and may be seen first.
                heard |= self._hear(running, 0.2)
                self._fail([rank for rank, answer in heard.items() if answer is None])
            answers |= heard
        return [bool(answer) for answer in answers.values()]

    def _hear(self, running: dict[Any, int], timeout: float) -> dict[int, bool | None]:
        """What ranks have said until now, None for one that has died; they are taken out of ``running``."""
        heard: dict[int, bool | None] = {}
        for pipe in multiprocessing.connection.wait(list(running), timeout):
            rank = running.pop(pipe)
            try:
                heard[rank] = pipe.recv()
            except (EOFError, OSError):
                self.processes[rank].join()
                heard[rank] = None
        return heard

    def _fail(self, failed: list[int]) -> NoReturn:
        outputs = {rank: self._output(rank) for rank in range(self.world_size)}
        raised = {rank: error for rank in range(self.world_size) if (error := self._error(rank))}
        died = [rank for rank in failed if rank not in raised]
        tracebacks = {rank: error["traceback"] for rank, error in raised.items()}
        if died:
            rank, code = died[0], self.processes[died[0]].exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            summary = f"rank {rank} of {self.world_size} {how} before it returned"
        else:
            rank = min(raised, key=lambda rank: raised[rank]["time"])
            summary = f"rank {rank} of {self.world_size} raised {raised[rank]['summary']}"
        raise RankFailure(rank, summary, tracebacks, outputs)

    def _fail_hanging(self, hanging: list[int], timeout: float) -> NoReturn:
        for rank in hanging:
            os.kill(self.processes[rank].pid, rank_process.STACK_SIGNAL)
        time.sleep(1.0)  # for the stacks to be written
        errors = {rank: error["traceback"] for rank in range(self.world_size) if (error := self._error(rank))}
        outputs = {rank: self._output(rank) for rank in range(self.world_size)}
        summary = f"ranks {hanging} of {self.world_size} were still running after {timeout:g} s; their stacks are below"
        raise RankFailure(hanging[0], summary, errors, outputs)

    def dismiss(self) -> None:
        """Ends the processes and whatever they have started."""
        for process in self.processes:
            if not process.is_alive():
                continue
            # A rank leads a process group of its own: what it started goes with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            pipe.close()
        shutil.rmtree(self.folder)
        self.gpus.end()

    def _output(self, rank: int) -> str:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / f"{rank}.output").read_text(errors="replace").splitlines()
            omitted = [f"... {len(lines) - _OUTPUT_LINES} lines"] if len(lines) > _OUTPUT_LINES else []
            return "\n".join(omitted + lines[-_OUTPUT_LINES:])
        return ""

    def _outputs(self) -> str:
        texts = {rank: self._output(rank) for rank in range(self.world_size)}
        return "".join(f"----- rank {rank}: output -----\n{text}\n" for rank, text in texts.items() if text)

    def _error(self, rank: int) -> dict[str, Any] | None:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads((self.folder / f"{rank}.error").read_text())
        return None


_crews: dict[int, _Crew] = {}


def rank_environments(world_size: int, port: int) -> list[dict[str, str]]:
    """The variables of every rank: those of the caller and those that torchrun sets."""
    common = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if on_cuda():
        # Hundreds of small communicators are made, by many processes per GPU.
        common.update(NCCL_BUFFSIZE=str(2**20), NCCL_MAX_NCHANNELS="4")
    environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    if on_cuda() and torch.cuda.device_count() < world_size:
        # NCCL refuses two ranks of one host on one GPU: let each be a host of its own, over the loopback interface.
        for rank, environment in enumerate(environments):
            environment.update(NCCL_HOSTID=f"rank-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    return environments


class _SharedCUDAAccelerator(CUDAAccelerator):
    """GPUs that may be fewer than the ranks."""

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("cuda", index % torch.cuda.device_count()) for index in devices]
