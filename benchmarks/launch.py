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

from benchmarks.cells import COLLECTIVE, RANDOM, Cell
from benchmarks.measure import merge
from benchmarks.records import ROOT, Record, provenance
from lightning_ep import planner

_GRACE_S = 5.0  # between the first rank that fails and the end of the others, which wait for it


def run_cell(cell: Cell, timeout: float, folder: Path) -> Record:
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
    codes = _run_ranks(cell, tree, folder.absolute(), timeout)
    return {**record, "seconds": time.monotonic() - start, **_outcome(cell, folder, codes, timeout)}


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
    # The folder has this tree's ``benchmarks`` alone: whose ``lightning_ep`` runs is said by the path behind it.
    (folder / "benchmarks").unlink(missing_ok=True)
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = int(probe.getsockname()[1])
    path = os.pathsep.join(filter(None, [str(folder), str(tree), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ, "WORLD_SIZE": str(cell.ranks), "LOCAL_WORLD_SIZE": str(cell.ranks), "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1",
        "TORCHELASTIC_RUN_ID": "benchmarks",  # so that Lightning takes the processes as started
        **({"OMP_NUM_THREADS": "1"} if cell.device == "cpu" else {}),
    }  # fmt: skip
    deadline = time.monotonic() + timeout
    command = [sys.executable, "-m", "benchmarks.measure", json.dumps(dataclasses.asdict(cell))]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(cell.ranks):
            with (folder / f"{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    [*command, str(folder / f"{rank}.json")], cwd=folder, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True,  # what a rank starts goes with it
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


def _outcome(cell: Cell, folder: Path, codes: list[int | None], timeout: float) -> Record:
    paths = [folder / f"{rank}.json" for rank in range(cell.ranks)]
    results = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
    # Out of memory on one rank shows as lost connections on the others, a death as either.
    for status in ("out of memory", "failed"):
        for result in results:
            if result.get("status") == status:
                return result
    silent = [rank for rank, result in enumerate(results) if not result]
    for rank in sorted(silent, key=lambda rank: codes[rank] is None):  # who died before who still ran
        lines = (folder / f"{rank}.log").read_text(errors="replace").split("\n")
        line = next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no output")
        if codes[rank] is not None:
            return {"status": "failed", "error": f"rank {rank} ended with code {codes[rank]}: {line}"}
        return {"status": "timed out", "error": f"rank {rank} still ran after {timeout:.0f} s: {line}"}
    machine = results[0]["machine"]
    try:
        measured = merge(cell, [result["measured"] for result in results])
    except ValueError as error:
        return {"status": "failed", "error": str(error), "machine": machine}
    share = mfu(cell, measured["tokens_per_second"], machine["device_name"])
    return {"status": "ok", "machine": machine, **measured, "mfu": share}
