"""All named cells of one node, unattended: ``python -m benchmarks.node``, again until every cell is recorded."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.cells import SIZES
from benchmarks.launch import device_name
from benchmarks.matrix import node_matrix
from benchmarks.node_report import matrix_table
from benchmarks.report import table
from benchmarks.train import run

_TIMEOUT_S = {"train": 240.0, "weights": 300.0}


def main(arguments: list[str] | None = None) -> None:
    """Runs the cells that are not recorded yet, and prints estimates and measurements side by side."""
    options = _parser().parse_args(arguments)
    ranks = options.ranks or (torch.cuda.device_count() if options.device == "cuda" else 1)
    if ranks == 0:
        sys.exit("There is no GPU here. Run with --device cpu --sizes tiny to try the command itself.")
    matrix = node_matrix(ranks, options.layers, options.sizes, options.device)
    name = device_name(options.device)
    complete = run(
        {cell: _TIMEOUT_S[cell.task] for cell in matrix.values()},
        options.json,
        options.budget,
        retry_failed=options.retry_failed,
        logs=options.logs,
        render=lambda records: "\n\n".join([matrix_table(matrix, records, name), table(records)]),
    )
    sys.exit(0 if complete else _GOES_ON)


_GOES_ON = 3  # exit status, for a shell's loop


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.node", description=f"{__doc__} Exits with {_GOES_ON} while cells are left."
    )
    add = parser.add_argument
    add("--ranks", type=int, help="processes; default: all GPUs")
    add("--layers", type=int, default=48)
    add("--sizes", default="qwen3-30b-a3b", choices=sorted(SIZES))
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--json", type=Path, default=Path("runs/benchmarks/node.jsonl"), help="records; recorded cells are skipped")
    add("--budget", type=float, default=540.0, help="seconds in all; the same command goes on where it stopped")
    add("--retry-failed", action="store_true", help="repeat recorded cells that did not succeed")
    add("--logs", type=Path, help="keep the output of every rank here")
    return parser


if __name__ == "__main__":
    main()
