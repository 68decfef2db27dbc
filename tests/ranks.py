"""Runs a function on several ranks, each its own process, in about a second.

```python
from tests.ranks import device, run_ranks

def _sum_of_ranks(scale):  # a module-level function: it is pickled by name
    total = torch.tensor(float(dist.get_rank() * scale), device=device())
    dist.all_reduce(total)
    return total.item()

def test_sum():
    assert run_ranks(4, _sum_of_ranks, 2) == [12.0] * 4
```

The ranks are forked from one server process that has the slow imports behind it. With LIGHTNING_EP_TEST_DEVICE=cuda
they use NCCL, several ranks per GPU where there are fewer GPUs than ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import importlib
import io
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.forkserver
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.accelerators import CUDAAccelerator

_REPOSITORY = Path(__file__).resolve().parents[1]
_PRELOAD = [
    "lightning.pytorch",
    "pytest",
    "tests.ranks",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
]
_STACK_SIGNAL = signal.SIGUSR2  # Lightning and SLURM use SIGUSR1
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


def device() -> torch.device:
    """The device of this rank; outside a rank that of rank 0."""
    if not _on_cuda():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def accelerator() -> str | CUDAAccelerator:
    """What to give to ``Trainer(accelerator=...)`` so that it trains on `device`."""
    return _SharedCUDAAccelerator() if _on_cuda() else "cpu"


_SLOWER_ON_GPU = 3  # every training makes communicators of its own, and ranks that share a GPU take turns


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    init_process_group: bool = True,
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
        timeout: Seconds after which ranks that still run are killed; on GPUs three times as many.

    Returns:
        What ``function`` returned, by rank; tensors on the CPU.

    Raises:
        RankFailure: If a rank raised, died or was still running after ``timeout``. No rank outlives this call.
    """
    server = start_fork_server()
    # The store lives here, as it does in torchrun's agent: its port cannot be taken before the ranks connect.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = _Ranks(Path(folder), world_size)
        ranks.pack((function, args, init_process_group, _rank_environments(world_size, store.port), os.getcwd()))
        try:
            ranks.start(server)
            ranks.wait(timeout * (_SLOWER_ON_GPU if _on_cuda() else 1))
        finally:
            ranks.kill()
        print(ranks.outputs(), end="")
        return [ranks.result(rank) for rank in range(world_size)]


@functools.cache
def start_fork_server() -> multiprocessing.context.ForkServerContext:
    """Starts the server, without waiting for its imports."""
    context = multiprocessing.get_context("forkserver")
    preload = list(_PRELOAD)
    # The server would die of an error in it; the ranks that import it report one better.
    with contextlib.suppress(Exception):
        importlib.import_module("lightning_ep")
        preload.append("lightning_ep")
    context.set_forkserver_preload(preload)
    path = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        multiprocessing.forkserver.ensure_running()
    return context


class _Ranks:
    """The processes of one call and the folder through which they answer."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self.folder = folder
        self.world_size = world_size
        self.processes: list[Any] = []

    def pack(self, call: Any) -> None:
        torch.save(call, self.folder / "call")

    def start(self, server: multiprocessing.context.ForkServerContext) -> None:
        for rank in range(self.world_size):
            process = server.Process(target=_rank_main, args=(str(self.folder), rank), name=f"rank {rank}")
            self.processes.append(process)
            process.start()

    def wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        running = {process.sentinel: rank for rank, process in enumerate(self.processes)}
        while running:
            ended = self._ended(running, max(0.0, deadline - time.monotonic()))
            if not ended:
                self._fail_hanging(sorted(running.values()), timeout)
            if not all(self._succeeded(rank) for rank in ended):
                # The peers of a rank that died fail too and may be seen first.
                ended += self._ended(running, 0.2)
                self._fail([rank for rank in ended if not self._succeeded(rank)])

    def _ended(self, running: dict[int, int], timeout: float) -> list[int]:
        ready = multiprocessing.connection.wait(list(running), timeout)
        ended = [running.pop(sentinel) for sentinel in ready]
        for rank in ended:
            self.processes[rank].join()
        return ended

    def _succeeded(self, rank: int) -> bool:
        return self.processes[rank].exitcode == 0 and (self.folder / f"{rank}.result").exists()

    def _fail(self, failed: list[int]) -> NoReturn:
        outputs = {rank: self.output(rank) for rank in range(self.world_size)}
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
            os.kill(self.processes[rank].pid, _STACK_SIGNAL)
        time.sleep(1.0)  # for the stacks to be written
        errors = {rank: error["traceback"] for rank in range(self.world_size) if (error := self._error(rank))}
        outputs = {rank: self.output(rank) for rank in range(self.world_size)}
        summary = f"ranks {hanging} of {self.world_size} were still running after {timeout:g} s; their stacks are below"
        raise RankFailure(hanging[0], summary, errors, outputs)

    def kill(self) -> None:
        for process in self.processes:
            if process.pid is None or not process.is_alive():
                continue
            # A rank leads a process group of its own: what it started goes with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process in self.processes:
            if process.pid is not None:
                process.join()

    def output(self, rank: int) -> str:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / f"{rank}.output").read_text(errors="replace").splitlines()
            omitted = [f"... {len(lines) - _OUTPUT_LINES} lines"] if len(lines) > _OUTPUT_LINES else []
            return "\n".join(omitted + lines[-_OUTPUT_LINES:])
        return ""

    def outputs(self) -> str:
        texts = {rank: self.output(rank) for rank in range(self.world_size)}
        return "".join(f"----- rank {rank}: output -----\n{text}\n" for rank, text in texts.items() if text)

    def result(self, rank: int) -> Any:
        return torch.load(self.folder / f"{rank}.result", map_location="cpu", weights_only=False)

    def _error(self, rank: int) -> dict[str, Any] | None:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads((self.folder / f"{rank}.error").read_text())
        return None


def _rank_main(folder: str, rank: int) -> None:
    """What a rank runs."""
    os.setsid()
    _die_with_parent()
    _redirect_output(f"{folder}/{rank}.output")
    faulthandler.enable(all_threads=True)
    faulthandler.register(_STACK_SIGNAL, all_threads=True)
    try:
        result = _call(folder, rank)
        # Not multiprocessing's own pickling: it would pass tensors as handles to memory that ends with this process.
        buffer = io.BytesIO()
        torch.save(result, buffer)
        Path(folder, f"{rank}.result").write_bytes(buffer.getvalue())
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as exception:
        summary = "".join(traceback.format_exception_only(exception)).strip()
        error = {"time": time.monotonic(), "summary": summary, "traceback": traceback.format_exc()}
        Path(folder, f"{rank}.error").write_text(json.dumps(error))
        sys.stdout.flush()
        # Not an ordinary exit: it can wait for peers, and would leave data loader workers behind.
        os.killpg(0, signal.SIGKILL)


def _call(folder: str, rank: int) -> Any:
    function, args, init_process_group, environments, directory = torch.load(f"{folder}/call", weights_only=False)
    os.environ.clear()
    os.environ.update(environments[rank])
    os.chdir(directory)
    rank_zero_only.rank = rank  # set at import in a process that was started with these variables
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    if _on_cuda():
        torch.cuda.set_device(device())
    if init_process_group:
        bound = {"device_id": device()} if _on_cuda() else {}
        dist.init_process_group("nccl" if _on_cuda() else "gloo", **bound)
    return function(*args)


def _rank_environments(world_size: int, port: int) -> list[dict[str, str]]:
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
    environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
    if _on_cuda() and torch.cuda.device_count() < world_size:
        # NCCL refuses two ranks of one host on one GPU: let each be a host of its own, over the loopback interface.
        for rank, environment in enumerate(environments):
            environment.update(NCCL_HOSTID=f"rank-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    return environments


def _die_with_parent() -> None:
    """Has the kernel kill this process when the fork server ends, which ends with pytest, however that ends."""
    # The server ends when nobody holds this pipe; multiprocessing hands it to every process that the server forks.
    server = multiprocessing.forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)


def _redirect_output(path: str) -> None:
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _on_cuda() -> bool:
    return os.environ.get("LIGHTNING_EP_TEST_DEVICE", "cpu") == "cuda"


class _SharedCUDAAccelerator(CUDAAccelerator):
    """GPUs that may be fewer than the ranks."""

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("cuda", index % torch.cuda.device_count()) for index in devices]
