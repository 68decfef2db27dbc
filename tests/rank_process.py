"""What a rank runs: one call after another, each in the surroundings of a process that has just been started."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import io
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from lightning_ep import process_groups
from lightning_ep.process_groups import one_worker_per_gloo_group

STACK_SIGNAL = signal.SIGUSR2  # Lightning and SLURM use SIGUSR1
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGXFSZ)


def on_cuda() -> bool:
    return os.environ.get("LIGHTNING_EP_TEST_DEVICE", "cpu") == "cuda"


def device() -> torch.device:
    """The device of this rank; outside a rank that of rank 0."""
    if not on_cuda():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def main(pipe: multiprocessing.connection.Connection, rank: int) -> None:
    """Serves calls until the pipe is closed.

    What is said: the folder of a call, and whether it is the only one; that it has returned here; that it has returned
    on all ranks; whether this process may be called again.
    """
    os.setsid()
    _die_with_parent()
    # As in a process that was not forked by a server; workers of data loaders would import all anew.
    multiprocessing.set_start_method("fork", force=True)
    faulthandler.enable(all_threads=True)
    faulthandler.register(STACK_SIGNAL, all_threads=True)
    with contextlib.suppress(EOFError):
        alone = False
        while not alone:
            folder, alone = pipe.recv()
            _serve(pipe, folder, rank, alone)


def _serve(pipe: multiprocessing.connection.Connection, folder: str, rank: int, alone: bool) -> None:
    _redirect_output(f"{folder}/{rank}.output")
    try:
        threads = threading.active_count()
        with _surroundings():
            result = _call(folder, rank)
            # Not multiprocessing's own pickling: it would pass tensors as handles to this process's memory.
            buffer = io.BytesIO()
            torch.save(result, buffer)
            del result
            Path(folder, f"{rank}.result").write_bytes(buffer.getvalue())
            pipe.send(True)
            if not alone:
                pipe.recv()  # peers may still need what this rank has of the group
        sys.stdout.flush()
        # What still runs might go on to work on what the next call makes.
        pipe.send(not alone and threading.active_count() == threads and not multiprocessing.active_children())
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
    if on_cuda():
        torch.cuda.set_device(device())
        torch.cuda.reset_peak_memory_stats()
        torch.backends.cudnn.allow_tf32 = False  # convolutions over patches of images round to TF32 otherwise
    one_worker_per_gloo_group(device().type)  # a run of the tests gathers a million times, also before there is a mesh
    if init_process_group and not dist.is_initialized():
        bound = {"device_id": device()} if on_cuda() else {}
        dist.init_process_group("nccl" if on_cuda() else "gloo", **bound)
    return function(*args)


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """What a call changes of its process is put back."""
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    settings = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    package = {name: dict(vars(module)) for name, module in _modules_of_the_package()}
    with warnings.catch_warnings():
        yield
    for name, module in _modules_of_the_package():
        for key, value in package.get(name, {}).items():
            if getattr(module, key, None) is not value:
                setattr(module, key, value)
    gc.collect()
    _end_groups()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if on_cuda():
        torch.cuda.empty_cache()
    torch.set_default_dtype(settings[0])
    torch.use_deterministic_algorithms(settings[1])
    torch.backends.cudnn.benchmark = settings[2]
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def _modules_of_the_package() -> list[tuple[str, ModuleType]]:
    return [(name, module) for name, module in sys.modules.items() if name.partition(".")[0] == "lightning_ep"]


def _end_groups() -> None:
    if not dist.is_initialized():
        return
    end_groups_of_runs()
    # On GPUs the default one lives on: torch 2.11 breaks (SIGSEGV in `split_group`) once it has been initialised again.
    if not on_cuda():
        dist.destroy_process_group()


def end_groups_of_runs() -> None:
    """Ends all groups but the default one: torch keeps them, and each of gloo has threads that look every 10 ms."""
    process_groups._made.clear()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    # It holds meshes whose groups have just ended. Every thread has one: autograd's thread of a GPU, too.
    _clear_sharding_prop_cache()
    if on_cuda():
        (one := torch.ones(1, device=device(), requires_grad=True)).register_hook(
            lambda _: _clear_sharding_prop_cache()
        )
        one.backward()


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
