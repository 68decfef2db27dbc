"""Training step of lightning_ep and its peers on the same shapes, or of this tree and another commit's, in turns."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.cells import DATA, EXCHANGES, OURS, TRAINERS, Cell, default_trainers, parse_shape
from benchmarks.launch import device_name, run_cell
from benchmarks.records import Record, append, find, parser, write
from benchmarks.tables import comparison, overview

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
        write(path, tables(found), found)


def _cells(options: argparse.Namespace) -> list[Cell]:
    ranks: int = options.ranks or (torch.cuda.device_count() if options.device == "cuda" else 1)
    if ranks == 0:
        sys.exit("There is no GPU here. Run with --device cpu --sizes tiny to try the command itself.")
    trainers = options.trainers or default_trainers(ranks, peers=not options.against)
    product = ("data", "exchange", "monitor")
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
    add("--exchange", nargs="+", default=["collective"], choices=EXCHANGES, help="how rows go to experts and back: "
        f"all-to-all, or copies by receivers; none leaves that out, to see what it adds: {OURS}N only")  # fmt: skip
    add("--monitor", nargs="+", type=int, default=[0], metavar="N", help="ExpertLoadMonitor looks at every Nth step; "
        f"0: there is none: {OURS}N only")  # fmt: skip
    add("--lora", metavar="WHERE,RANK", help="train adapters over frozen bf16 weights: attention,16 or (with experts) "
        "all,8")  # fmt: skip
    add("--bf16-weights", action="store_true", help="no fp32 masters: all in bf16, which ours rounds stochastically")
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
