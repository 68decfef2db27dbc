"""All named cells of one node, unattended: ``python -m benchmarks.node``, again until every cell is recorded."""

from __future__ import annotations

import argparse
import sys

from benchmarks.launch import device_name
from benchmarks.matrix import node_matrix
from benchmarks.node_report import matrix_table
from benchmarks.records import read
from benchmarks.report import table
from benchmarks.train import add_run_options, num_ranks, run

_TIMEOUT_S = {"train": 240.0, "weights": 300.0}


def main(arguments: list[str] | None = None) -> None:
    """Runs the cells that are not recorded yet, and prints estimates and measurements side by side."""
    options = _parser().parse_args(arguments)
    matrix = node_matrix(num_ranks(options), options.layers, options.sizes, options.device)
    name = device_name(options.device)
    cells = list(matrix.values())
    if options.rehearse:
        cells = [cell.rehearsal for cell in cells if cell.can_rehearse]
    complete = run(
        {cell: _TIMEOUT_S[cell.task] for cell in cells},
        options.json,
        options.budget,
        retry_failed=options.retry_failed,
        logs=options.logs,
        # The matrix of all that is recorded: rehearsals and runs stand side by side.
        render=lambda records: "\n\n".join([matrix_table(matrix, read(options.json), name), table(records)]),
    )
    sys.exit(0 if complete else _GOES_ON)


_GOES_ON = 3  # exit status, for a shell's loop


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.node", description=f"{__doc__} Exits with {_GOES_ON} while cells are left."
    )
    add_run_options(parser, layers=48, records="node.jsonl")
    return parser


if __name__ == "__main__":
    main()
