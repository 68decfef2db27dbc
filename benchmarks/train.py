"""Training step of lightning_ep and its peers on the same shapes, or of this tree and another commit's, in turns."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import (
    BOUNDARIES,
    CHATS,
    COLLECTIVE,
    LEFT_OUT,
    OURS,
    RANDOM,
    SIZES,
    TRAINERS,
    Cell,
    default_trainers,
    parse_shape,
)
from benchmarks.launch import device_name, run_cell
from benchmarks.records import append, find
from benchmarks.tables import comparison, table

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
    render = comparison if options.against else table
    sys.exit(run(dict.fromkeys(cells, options.timeout), options.json, options.budget, render))


def run(
    cells: Mapping[Cell, float],
    path: Path,
    budget: float,
    render: Callable[[Sequence[dict[str, Any]]], str] = table,
    measure: Callable[[Cell, float, Path], dict[str, Any]] = run_cell,
) -> int:
    """Measures the cells that ``path`` does not hold yet, and appends each as it is done.

    However it ends (killed excepted), it prints the table of what is known of these cells and writes it beside
    ``path``; the output of their ranks is in a folder there. Cells come with the seconds that each may take, the most
    informative first; one that ``budget``, the seconds in all, cuts short is not recorded: the next call repeats it.

    Returns:
        Exit status: 0 when every cell is recorded, `_GOES_ON` while some are left.
    """
    deadline = time.monotonic() + budget
    try:
        for number, (cell, timeout) in enumerate(cells.items(), 1):
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
            print(f"    {_line(record)}", flush=True)
            append(path, record)
        return 0
    finally:
        found = [find(path, cell, device_name(cell.device)) for cell in cells]
        text = render([record for record in found if record is not None])
        print(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".md").write_text(text + "\n")


def _line(record: dict[str, Any]) -> str:
    if record["status"] != "ok":
        return f"{record['status']}: {record['error']}"
    return f"{record['tokens_per_second']:,.0f} tokens/s per GPU, {record['seconds']:.0f} s in all"


def _cells(options: argparse.Namespace) -> list[Cell]:
    ranks = num_ranks(options)
    trainers = options.trainers or default_trainers(ranks, peers=not options.against)
    names = (
        "sizes",
        "layers",
        "steps",
        "warmup",
        "memory_cap_gib",
        "lora",
        "bf16_weights",
        "device",
        "balanced",
        "accumulate",
    )
    settings = {name: getattr(options, name) for name in names}
    kinds = itertools.product(map(parse_shape, options.tokens), options.data, trainers, options.exchange)
    return [Cell(trainer, *shape, ranks, data=data, exchange=how, **settings) for shape, data, trainer, how in kinds]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    add = parser.add_argument
    add("--trainers", nargs="+", help=f"{TRAINERS}; + names what is recomputed")
    add("--tokens", nargs="+", default=["4x4096", "1x16384", "1x4096"], help="sequences x tokens, per rank")
    add("--data", nargs="+", default=[RANDOM], choices=[RANDOM, CHATS, BOUNDARIES], help="tokens; packed chats; random "
        f"tokens in place of those of the chats: {OURS}N only")  # fmt: skip
    add("--balanced", action="store_true", help=f"as many tokens for every expert, whatever routers say: {OURS}N only")
    add("--accumulate", type=int, default=1, metavar="N", help=f"micro-batches per step: {OURS}N only")
    add("--exchange", nargs="+", default=[COLLECTIVE], choices=[COLLECTIVE, LEFT_OUT], help="how rows go to "
        f"experts and back; {LEFT_OUT} leaves out the all-to-all alone, to see what it adds: {OURS}N only")  # fmt: skip
    add("--steps", type=int, default=30)
    add("--warmup", type=int, default=5)
    add("--memory-cap-gib", type=float, metavar="GIB", help="limit of torch's allocator per GPU: a smaller card")
    add(
        "--lora",
        metavar="WHERE,RANK",
        help="train adapters over frozen bf16 weights: attention,16 or (with experts) all,8",
    )
    add("--bf16-weights", action="store_true", help="no fp32 masters: all in bf16, which ours rounds stochastically")
    add("--timeout", type=float, default=240.0, help="seconds per cell")
    add("--against", type=Path, metavar="DIR", help=f"another commit's tree, which takes turns with this: {OURS}N only")
    add_run_options(parser, layers=12, records="train.jsonl")
    return parser


def add_run_options(parser: argparse.ArgumentParser, layers: int, records: str) -> None:
    """Adds what every command that calls `run` takes, with its defaults of the depth and the records' file name."""
    add = parser.add_argument
    add("--layers", type=int, default=layers)
    add("--sizes", default="qwen3-30b-a3b", choices=sorted(SIZES))
    add("--ranks", type=int, help="processes; default: all GPUs")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--json", type=Path, default=Path("runs/benchmarks", records), help="records; recorded cells are skipped")
    add("--budget", type=float, default=540.0, help=f"seconds in all; exits with {_GOES_ON} if cells are left, and the "
        "same command goes on")  # fmt: skip


def num_ranks(options: argparse.Namespace) -> int:
    """Processes to start by the options of `add_run_options`; ends this one where there is no GPU for them."""
    ranks: int = options.ranks or (torch.cuda.device_count() if options.device == "cuda" else 1)
    if ranks == 0:
        sys.exit("There is no GPU here. Run with --device cpu --sizes tiny to try the command itself.")
    return ranks


if __name__ == "__main__":
    main()
