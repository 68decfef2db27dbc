"""Runs a cell in processes of its own, one per rank, and turns whatever happens to them into one record."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import costs
from benchmarks.cells import TORCHTITAN, Cell
from benchmarks.estimates import estimates
from benchmarks.measure import merge

_ROOT = Path(__file__).resolve().parents[1]
_GRACE_S = 5.0  # between the first rank that fails and the end of the others, which wait for it


def run_cell(cell: Cell, timeout: float, log_folder: Path | None = None) -> dict[str, Any]:
    """Measures one cell; never raises for what happens inside of it.

    Args:
        cell: What to run.
        timeout: Seconds after which its processes are killed.
        log_folder: Where the output of every rank is kept; a temporary folder by default.

    Returns:
        A record: ``cell``, ``status`` (``ok``, ``out of memory``, ``failed``, ``timed out`` or ``skipped``), ``error``
        if it is not ``ok``, ``seconds`` in all, ``date``, what was estimated before, and what was measured.
    """
    name = device_name(cell.device)
    record: dict[str, Any] = {"cell": dataclasses.asdict(cell), "device_name": name, "date": _now()}
    record |= estimates(cell, name)
    reason = _why_skip(cell)
    if reason is not None:
        return {**record, "status": "skipped", "error": reason}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cell-") as temporary:
        folder = log_folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.json"):
            stale.unlink()
        codes = _run_ranks(cell, folder, timeout)
        record["seconds"] = time.monotonic() - start
        return {**record, **_outcome(cell, folder, codes, timeout)}


@functools.cache
def device_name(device: str) -> str:
    """Name of the first GPU, asked for without touching it from this process."""
    if device == "cpu":
        return "CPU"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()[0]


def _why_skip(cell: Cell) -> str | None:
    if cell.trainer != TORCHTITAN:
        return None
    return "torchtitan needs a GPU" if cell.device == "cpu" else _why_no_torchtitan()


@functools.cache
def _why_no_torchtitan() -> str | None:
    # Its imports touch CUDA; a process of its own keeps that out of this one.
    code = "from benchmarks.peer_torchtitan import why_not; print(why_not() or '')"
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, timeout=300)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return lines[-1] if lines else None


def _run_ranks(cell: Cell, folder: Path, timeout: float) -> list[int | None]:
    """Exit codes by rank, None for those that were killed here because the time was up."""
    deadline = time.monotonic() + timeout
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "WORLD_SIZE": str(cell.ranks),
        "LOCAL_WORLD_SIZE": str(cell.processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "TORCHELASTIC_RUN_ID": "benchmarks",  # so that Lightning takes the processes as started
    }
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    if cell.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(dataclasses.asdict(cell))]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(cell.processes):
            with (folder / f"{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    [*command, str(folder / f"{rank}.json")],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    cwd=_ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # what a rank starts goes with it
                )
            processes.append(process)
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.returncode not in (None, 0) for process in processes):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            time.sleep(0.05)
        return [process.poll() for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _outcome(cell: Cell, folder: Path, codes: list[int | None], timeout: float) -> dict[str, Any]:
    paths = [folder / f"{rank}.json" for rank in range(cell.processes)]
    results = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
    # Out of memory on one rank shows as lost connections on the others.
    for status in ("out of memory", "failed"):
        for result in results:
            if result.get("status") == status:
                return {"status": status, "error": result["error"]}
    died = [rank for rank, code in enumerate(codes) if code not in (None, 0) and not results[rank]]
    if died:
        line = _last_line(folder / f"{died[0]}.log")
        return {"status": "failed", "error": f"rank {died[0]} ended with code {codes[died[0]]}: {line}"}
    if not all(results):
        rank = next(rank for rank, result in enumerate(results) if not result)
        return {
            "status": "timed out",
            "error": f"rank {rank} still ran after {timeout:.0f} s: {_last_line(folder / f'{rank}.log')}",
        }
    machine = results[0]["machine"]
    try:
        measured = merge(cell, [result["measured"] for result in results])
    except ValueError as error:
        return {"status": "failed", "error": str(error), "machine": machine}
    if cell.task == "train":
        measured["mfu"] = costs.mfu(cell, measured["tokens_per_second"], machine["device_name"])
    return {"status": "ok", "machine": machine, **measured}


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
