"""Training step of lightning_ep and its peers on the same shapes: ``python -m benchmarks.train --help``."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import SIZES, Cell, default_trainers, parse_shape
from benchmarks.launch import device_name, run_cell
from benchmarks.records import append, key, latest, read
from benchmarks.report import draw, table

_LEAST = 1 / 3  # of a cell's time; with less left of the budget it is not started


def main(arguments: list[str] | None = None) -> None:
    """Runs the matrix trainers x routers x shapes and prints the table."""
    options = _parser().parse_args(arguments)
    ranks = num_ranks(options)
    cells = dict.fromkeys(_cells(options, ranks), options.timeout)
    run(cells, options.json, options.budget, retry_failed=options.retry_failed, logs=options.logs)


def run(
    cells: Mapping[Cell, float],
    path: Path,
    budget: float,
    *,
    retry_failed: bool = False,
    logs: Path | None = None,
    render: Callable[[Sequence[dict[str, Any]]], str] = table,
    measure: Callable[[Cell, float, Path | None], dict[str, Any]] = run_cell,
) -> bool:
    """Measures the cells that ``path`` does not hold yet, and appends each as it is done.

    However it ends (killed excepted), it prints the table of what is known and writes it beside ``path``, with a plot
    where matplotlib is installed.

    Args:
        cells: The matrix, most informative first, with the seconds that each may take.
        path: JSON lines, one record per cell.
        budget: Seconds in all; a cell that this cuts short is not recorded, so that the next call repeats it.
        retry_failed: Repeat recorded cells that did not succeed.
        logs: Folder for the output of every rank.
        render: Makes the table of the records of these cells.
        measure: What runs one cell.

    Returns:
        Whether every cell is recorded.
    """
    deadline = time.monotonic() + budget
    skipped: dict[Cell, dict[str, Any]] = {}
    try:
        for number, (cell, timeout) in enumerate(cells.items(), 1):
            known = _known(path, cell)
            if known is not None and (known["status"] == "ok" or not retry_failed):
                continue
            left = deadline - time.monotonic()
            if left < _LEAST * timeout:
                print(f"{number - 1} of {len(cells)} cells are done and the budget is; the same command goes on.")
                return False
            print(f"[{number}/{len(cells)}] {cell.label} ...", flush=True)
            folder = None if logs is None else logs / cell.label.replace("/", "-").replace(" ", "-")
            record = {**measure(cell, min(timeout, left), folder), "command": _command()}
            if record["status"] == "timed out" and left < timeout:
                print("    cut by the budget; the same command repeats it.")
                return False
            print(f"    {_line(record)}", flush=True)
            if record["status"] == "skipped":  # a missing peer is no result: once installed, it runs
                skipped[cell] = record
            else:
                append(path, record)
        return True
    finally:
        records = [_known(path, cell) or skipped.get(cell) for cell in cells]
        _show([record for record in records if record is not None], path, render)


def _known(path: Path, cell: Cell) -> dict[str, Any] | None:
    return latest(read(path)).get(key(dataclasses.asdict(cell), device_name(cell.device)))


def _show(records: list[dict[str, Any]], path: Path, render: Callable[[Sequence[dict[str, Any]]], str]) -> None:
    text = render(records)
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text + "\n")
    draw(records, path.with_suffix(".png"))


def _cells(options: argparse.Namespace, ranks: int) -> list[Cell]:
    cells = []
    for router in options.router:
        for shape in options.tokens:
            batch, sequence = parse_shape(shape)
            for trainer in options.trainers or default_trainers(ranks):
                cells.append(
                    Cell(
                        trainer=trainer,
                        batch=batch,
                        sequence=sequence,
                        ranks=ranks,
                        sizes=options.sizes,
                        layers=options.layers,
                        precision=options.precision,
                        router=router,
                        steps=options.steps,
                        warmup=options.warmup,
                        memory_cap_gib=options.memory_cap,
                        device=options.device,
                    )
                )
    if options.rehearse:  # of trainers that were named each must do
        return [cell.rehearsal for cell in cells if options.trainers or cell.can_rehearse]
    return cells


def _command() -> str:
    return f"python -m benchmarks.{Path(sys.argv[0]).stem} {shlex.join(sys.argv[1:])}".strip()


def _line(record: dict[str, Any]) -> str:
    if record["status"] != "ok":
        return f"{record['status']}: {record['error']}"
    if record["cell"].get("task") == "weights":
        speed = f"{record['gb']:.1f} GB saved in {record['save_s']:.1f} s, loaded in {record['load_s']:.1f} s"
    else:
        speed = f"{record['tokens_per_second']:,.0f} tokens/s per GPU"
    return f"{speed}, {record['seconds']:.0f} s in all"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    add = parser.add_argument
    add(
        "--trainers",
        nargs="+",
        help="lightning_ep/ep=N[,cp=M][,tp=M][+selective|+full], transformers/fsdp2|ep|single[+full] (each also "
        "+compile), torchtitan/ep[+full]; + names what is recomputed",
    )
    add("--tokens", nargs="+", default=["4x4096", "1x16384", "1x4096"], help="sequences x tokens, per rank")
    add("--router", nargs="+", default=["balanced"], choices=["balanced", "skewed"])
    add("--precision", default="bf16-mixed", choices=["bf16-mixed", "bf16-true", "32-true"])
    add("--steps", type=int, default=30)
    add("--warmup", type=int, default=5)
    add("--memory-cap", type=float, metavar="GIB", help="limit of torch's allocator per GPU: a smaller card")
    add("--timeout", type=float, default=240.0, help="seconds per cell")
    add_run_options(parser, layers=12, records="train.jsonl")
    return parser


def add_run_options(parser: argparse.ArgumentParser, layers: int, records: str) -> None:
    """Adds what every command that calls `run` takes.

    Args:
        parser: Its parser.
        layers: Default depth.
        records: Default file name of the records.
    """
    add = parser.add_argument
    add("--layers", type=int, default=layers)
    add("--sizes", default="qwen3-30b-a3b", choices=sorted(SIZES))
    add("--ranks", type=int, help="processes; default: all GPUs")
    add("--rehearse", action="store_true", help="run one of --ranks alone on one GPU, with its own data for its peers'")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--json", type=Path, default=Path("runs/benchmarks", records), help="records; recorded cells are skipped")
    add("--budget", type=float, default=540.0, help="seconds in all; the same command goes on where it stopped")
    add("--retry-failed", action="store_true", help="repeat recorded cells that did not succeed")
    add("--logs", type=Path, help="keep the output of every rank here")


def num_ranks(options: argparse.Namespace) -> int:
    """Processes to start by the options of `add_run_options`; ends this one where there is no GPU for them."""
    if options.rehearse and not options.ranks:
        sys.exit("--rehearse runs one rank of a larger job: say of how many with --ranks, such as --ranks 8.")
    ranks: int = options.ranks or (torch.cuda.device_count() if options.device == "cuda" else 1)
    if ranks == 0:
        sys.exit("There is no GPU here. Run with --device cpu --sizes tiny to try the command itself.")
    return ranks


if __name__ == "__main__":
    main()
