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
import time
from pathlib import Path
from typing import Any

from benchmarks.cells import COLLECTIVE, RANDOM, Cell
from benchmarks.measure import merge
from benchmarks.records import ROOT, provenance
from lightning_ep import planner

_GRACE_S = 5.0  # between the first rank that fails and the end of the others, which wait for it


def run_cell(cell: Cell, timeout: float, folder: Path) -> dict[str, Any]:
    """Measures one cell; never raises for what happens inside of it.

    After ``timeout`` seconds its processes are killed. What every rank prints is kept in ``folder``.

    Returns:
        A record: ``cell``, ``status`` (``ok``, ``out of memory``, ``failed`` or ``timed out``), ``error`` if it is not
        ``ok``, ``seconds`` in all, its provenance, what was estimated before, and what was measured.
    """
    name = device_name(cell.device)
    tree = Path(cell.tree) if cell.tree else ROOT
    record = {"cell": dataclasses.asdict(cell), "device_name": name, **provenance(tree), **estimates(cell, name)}
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.json"):
        stale.unlink()
    start = time.monotonic()
    codes = _run_ranks(cell, tree, folder, timeout)
    record["seconds"] = time.monotonic() - start
    return {**record, **_outcome(cell, folder, codes, timeout)}


@functools.cache
def device_name(device: str) -> str:
    """Name of the first GPU, asked for without touching it from this process."""
    if device == "cpu":
        return "CPU"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()[0]


def estimates(cell: Cell, device_name: str) -> dict[str, float]:
    """What goes into a cell's record before it runs; nothing where `lightning_ep.planner` knows nothing of it."""
    device = planner.find_device(device_name)
    ep, cp, tp = (cell.layout.get(name, 1) for name in ("ep", "cp", "tp"))
    other = cell.data != RANDOM or cell.lora is not None or cell.accumulate > 1 or cell.exchange != COLLECTIVE
    if device is None or not cell.ours or tp > 1 or other:
        return {}
    shape = (_widths(cell), cell.layers, cell.batch, cell.sequence, cell.ranks)
    try:
        precision = "bf16-true" if cell.bf16_weights else "bf16-mixed"
        case = planner.Case(*shape, ep, cp, precision, recompute=cell.recompute, compile=cell.compile)
    except ValueError:
        return {}  # a layout that does not exist: its run says so
    limit = planner.allocatable_gib(device, cell.memory_cap_gib)
    return {
        "estimate_tokens_per_second": planner.tokens_per_second(case, device),
        "estimate_peak_gib": planner.peak_gib(case, limit),
    }


def mfu(cell: Cell, tokens_per_second: float, device_name: str) -> float | None:
    """Share of the device's dense bf16 peak that the model's FLOPs take; None if unknown, or with adapters."""
    device = planner.find_device(device_name)
    if device is None or cell.data != RANDOM or cell.lora is not None:  # RANDOM: one document in each sequence
        return None
    return tokens_per_second * planner.flops_per_token(_widths(cell), cell.layers, cell.sequence) / device.flops


def _widths(cell: Cell) -> planner.ModelWidths:
    return planner.read_widths(cell.config().to_dict())[0]


def _run_ranks(cell: Cell, tree: Path, folder: Path, timeout: float) -> list[int | None]:
    """Exit codes by rank, None for those that were killed here because the time was up."""
    deadline = time.monotonic() + timeout
    code = _these_benchmarks(folder)
    environment = _environment(cell, [code, tree])
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(dataclasses.asdict(cell))]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(cell.ranks):
            with (folder / f"{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    [*command, str((folder / f"{rank}.json").absolute())], cwd=code,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True,  # what a rank starts goes with it
                )  # fmt: skip
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


def _these_benchmarks(folder: Path) -> Path:
    """A folder with this tree's ``benchmarks`` alone: whose ``lightning_ep`` runs is said by the path behind it."""
    code = (folder / "code").absolute()
    code.mkdir(exist_ok=True)
    link = code / "benchmarks"
    link.unlink(missing_ok=True)
    link.symlink_to(ROOT / "benchmarks")
    return code


def _environment(cell: Cell, path: list[Path]) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = int(probe.getsockname()[1])
    environment = {
        **os.environ, "WORLD_SIZE": str(cell.ranks), "LOCAL_WORLD_SIZE": str(cell.ranks), "GROUP_RANK": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [*map(str, path), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port),
        "TORCHELASTIC_RUN_ID": "benchmarks",  # so that Lightning takes the processes as started
    }  # fmt: skip
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    if cell.device == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    return environment


def _outcome(cell: Cell, folder: Path, codes: list[int | None], timeout: float) -> dict[str, Any]:
    paths = [folder / f"{rank}.json" for rank in range(cell.ranks)]
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
        line = _last_line(folder / f"{rank}.log")
        return {"status": "timed out", "error": f"rank {rank} still ran after {timeout:.0f} s: {line}"}
    machine = results[0]["machine"]
    try:
        measured = merge(cell, [result["measured"] for result in results])
    except ValueError as error:
        return {"status": "failed", "error": str(error), "machine": machine}
    share = mfu(cell, measured["tokens_per_second"], machine["device_name"])
    return {"status": "ok", "machine": machine, **measured, "mfu": share}


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
