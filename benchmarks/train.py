"""Training step of lightning_ep and its peers on the same shapes, or of this tree and another commit's, in turns."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.cells import DATA, EXCHANGES, LEFT_OUT, OURS, RANDOM, TRAINERS, Cell, default_trainers, parse_shape
from benchmarks.measure import merge
from benchmarks.records import ROOT, Record, append, comparison, find, overview, parser, provenance, write
from lightning_ep import planner

_GRACE_S = 5.0  # between the first rank that fails and the end of the others, which wait for it
_LEAST = 1 / 3  # of a cell's time; with less left of the budget it is not started
_GOES_ON = 3  # exit status, for a shell's loop


def main(arguments: list[str] | None = None) -> None:
    """Runs the matrix trainers x shapes and prints the table."""
    options = _parser().parse_args(arguments)
    cells = _cells(options)
    if options.against:
        if not (options.against / "lightning_ep").is_dir():
            sys.exit(f"{options.against} has no lightning_ep: unpack a commit there with git archive.")
        tree = str(options.against.resolve())
        cells = [turn for cell in cells for turn in cell.in_turns(tree)]
    tables = comparison if options.against else overview
    sys.exit(run(cells, options.json, options.timeout, options.budget, tables))


# ---------------------------------------------------------------------- a cell in processes of its own


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
    if device is None or not cell.ours or cell.data != RANDOM or cell.exchange == LEFT_OUT:
        return {}
    where, _, rank = (cell.lora or "all,0").partition(",")
    try:
        case = planner.Case(
            _widths(cell), cell.layers, cell.batch, cell.sequence, cell.ranks, **cell.layout,
            precision="bf16-true" if cell.bf16_weights else "bf16-mixed", recompute=cell.recompute,
            compile=cell.compile, accumulate=cell.accumulate, lora_rank=int(rank), lora_experts=where == "all",
            stochastic_rounding=cell.bf16_moments,
        )  # fmt: skip
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
    """Exit codes by rank, None for those that still ran when the time was up."""
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


# ---------------------------------------------------------------------- all cells


def run(
    cells: Sequence[Cell],
    path: Path,
    timeout: float,
    budget: float,
    tables: Callable[[Sequence[Record]], list[str]] = overview,
    measure: Callable[[Cell, float, Path], Record] = run_cell,
) -> int:
    """Measures the cells that ``path`` does not hold yet, and appends each as it is done.

    However it ends (killed excepted), it prints the table of what is known of these cells and writes it beside
    ``path``; the output of their ranks is in a folder there. Each may take ``timeout`` seconds; one that ``budget``,
    the seconds in all, cuts short is not recorded: the next call repeats it.

    Returns:
        Exit status: 0 when every cell is recorded, `_GOES_ON` while some are left.
    """
    deadline = time.monotonic() + budget
    try:
        for number, cell in enumerate(cells, 1):
            if find(path, cell, device_name(cell.device)):
                continue
            left = deadline - time.monotonic()
            if left < _LEAST * timeout:
                print(f"{number - 1} of {len(cells)} cells are done and the budget is; the same command goes on.")
                return _GOES_ON
            print(f"[{number}/{len(cells)}] {cell.label} ...", flush=True)
            name = f"{cell.trainer} {cell.shape} {cell.turn}".replace("/", "-").replace(" ", "-")
            record = measure(cell, min(timeout, left), path.with_suffix(".logs") / name)
            if record["status"] == "timed out" and left < timeout:
                print("    cut by the budget; the same command repeats it.")
                return _GOES_ON
            rate = f"{record.get('tokens_per_second', 0):,.0f} tokens/s per GPU, {record['seconds']:.0f} s in all"
            print("   ", rate if record["status"] == "ok" else f"{record['status']}: {record['error']}", flush=True)
            append(path, record)
        return 0
    finally:
        found = [known for cell in cells if (known := find(path, cell, device_name(cell.device)))]
        print(write(path, tables(found), found))


def _cells(options: argparse.Namespace) -> list[Cell]:
    ranks: int = options.ranks or (torch.cuda.device_count() if options.device == "cuda" else 1)
    if ranks == 0:
        sys.exit("There is no GPU here. Run with --device cpu --sizes tiny to try the command itself.")
    product = ("data", "exchange", "monitor")
    trainers = options.trainers or default_trainers(ranks, peers=not options.against)
    names = {field.name for field in dataclasses.fields(Cell)} & vars(options).keys() - {"ranks", *product}
    settings = {name: getattr(options, name) for name in names}
    return [
        Cell(trainer, batch, sequence, ranks, **settings, **dict(zip(product, values, strict=True)))
        for values in itertools.product(*(getattr(options, name) for name in product))
        for batch, sequence in map(parse_shape, options.tokens)
        for trainer in trainers
    ]


def _parser() -> argparse.ArgumentParser:
    made = parser("train", __doc__, layers=12)
    add = made.add_argument
    add("--trainers", nargs="+", help=f"{TRAINERS}; + names what is recomputed")
    add("--tokens", nargs="+", default=["4x4096", "1x16384", "1x4096"], help="sequences x tokens, per rank")
    add("--data", nargs="+", default=["random"], choices=DATA, help="tokens; packed chats; random tokens in place "
        f"of those of the chats: {OURS}N only")  # fmt: skip
    add("--balanced", action="store_true", help=f"as many tokens for every expert, whatever routers say: {OURS}N only")
    add("--accumulate", type=int, default=1, metavar="N", help=f"micro-batches per step: {OURS}N only")
    add("--exchange", nargs="+", default=["collective"], choices=EXCHANGES, help="none leaves out the all-to-all of "
        f"rows to experts and back, to see what it adds: {OURS}N only")  # fmt: skip
    add("--monitor", nargs="+", type=int, default=[0], metavar="N", help="ExpertLoadMonitor looks at every Nth step; "
        f"0: there is none: {OURS}N only")  # fmt: skip
    add("--lora", metavar="WHERE,RANK", help="train adapters over frozen bf16 weights: attention,16 or (with experts) "
        "all,8")  # fmt: skip
    add("--bf16-weights", action="store_true", help="no fp32 masters: all in bf16, which ours rounds stochastically")
    add("--bf16-moments", action="store_true", help=f"beside fp32 weights, rounded stochastically: {OURS}N only")
    add("--memory-cap-gib", type=float, metavar="GIB", help="limit of torch's allocator per GPU: a smaller card")
    add("--against", type=Path, metavar="DIR", help=f"another commit's tree, which takes turns with this: {OURS}N only")
    add("--ranks", type=int, help="processes; default: all GPUs")
    add("--steps", type=int, default=30)
    add("--warmup", type=int, default=5, help="the first step compiles, the second does so again, two settle memory")
    add("--timeout", type=float, default=240.0, help="seconds per cell")
    add("--budget", type=float, default=540.0, help=f"seconds in all: exits with {_GOES_ON} if cells are left; the "
        "same command goes on")  # fmt: skip
    return made


if __name__ == "__main__":
    main()
