"""The cells of one node at full depth, unattended; the same command again until every cell is recorded."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.cells import COMPILE, FSDP2, FULL, OURS, TRANSFORMERS_EP, Cell, parse_shape
from benchmarks.train import add_run_options, num_ranks, run

# Few steps, so that about seven cells of full depth fit into nine minutes. The first step compiles, the second does so
# again without the counters of the first, and two more settle the allocator.
_STEPS, _WARMUP = 8, 4
_TIMEOUT_S = 240.0
_SHORTER = 256  # sequences of the tiny model, which is for trying the command itself


def main(arguments: list[str] | None = None) -> None:
    """Runs the cells that are not recorded yet, and prints what was estimated and measured side by side."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.node", description=__doc__)
    add_run_options(parser, layers=48, records="node.jsonl")
    options = parser.parse_args(arguments)
    cells = node_cells(num_ranks(options), options.layers, options.sizes, options.device)
    sys.exit(run(dict.fromkeys(cells, _TIMEOUT_S), options.json, options.budget))


def node_cells(ranks: int = 8, layers: int = 48, sizes: str = "qwen3-30b-a3b", device: str = "cuda") -> list[Cell]:
    """At most 14 cells, most informative first.

    Peers are compiled, and recompute where they would not fit otherwise at full depth on 8 GPUs: transformers keeps
    2.2 GiB per layer at 16,384 tokens (91.5 and 78.4 GiB without and with recompute, 6 layers on one H200).
    Sequences of ``tiny`` models are shorter; on a CPU nothing is compiled.
    """

    def cell(trainer: str, shape: str = "4x4096", **settings: Any) -> Cell:
        batch, sequence = parse_shape(shape)
        sequence = sequence // _SHORTER if sizes == "tiny" else sequence
        trainer += COMPILE if device == "cuda" else ""
        settings |= {"steps": _STEPS, "warmup": _WARMUP, "device": device}
        return Cell(trainer, batch, sequence, ranks, sizes, layers, **settings)

    every, one = f"{OURS}{ranks}", f"{OURS}1"
    between = [ep for ep in (2, 4) if ep < ranks and ranks % ep == 0]
    cells = [
        cell(every + FULL),
        cell(FSDP2 + FULL),
        cell(every),
        cell(one),
        cell(one + FULL),
        *([cell(TRANSFORMERS_EP + FULL)] if ranks > 1 else []),
        *(cell(f"{OURS}{ep}") for ep in between),
        cell(every, "1x4096"),
        cell(every, "1x16384"),
        cell(every + FULL, "1x32768"),
        cell(every + FULL, memory_cap_gib=76.0),
        cell(FSDP2, "1x4096"),
        cell(FSDP2 + FULL, "1x16384"),
    ]
    return list(dict.fromkeys(cells))  # on one GPU `every` is `one`


if __name__ == "__main__":
    main()
