"""What is kept of a run, as soon as it is measured, with all that it takes to repeat it; and the tables of it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import SIZES, Cell

ROOT = Path(__file__).resolve().parents[1]
Record = dict[str, Any]


def parser(
    name: str, description: str | None, layers: int, sizes: Sequence[str] = tuple(SIZES)
) -> argparse.ArgumentParser:
    """Of ``python -m benchmarks.NAME``, with what all commands take."""
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=description, formatter_class=raw)
    made.add_argument("--sizes", default="qwen3-30b-a3b", choices=sizes, help="width of the model")
    made.add_argument("--layers", type=int, default=layers)
    made.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    made.add_argument("--json", type=Path, default=Path("runs/benchmarks", f"{name}.jsonl"), help="records, with "
        "tables beside them")  # fmt: skip
    return made


def read(path: Path) -> list[Record]:
    """The records of a file, none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: Record) -> None:
    """Adds a record."""
    _store(path, [*read(path), record])


def _store(path: Path, records: Sequence[Record]) -> None:
    """A kill leaves the file with the last record or without it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records))
    part.replace(path)


def find(path: Path, cell: Cell, device_name: str) -> Record | None:
    """The last record of a cell on a device, or None; a field of `Cell` that it was written without has its default."""
    for record in reversed(read(path)):
        if (Cell(**record["cell"]), record["device_name"]) == (cell, device_name):
            return record
    return None


def publish(path: Path, record: Record) -> str:
    """Keeps a record with ``title`` and ``rows``, in place of what its run has kept before; returns the file's page."""
    others = [known for known in read(path) if (known["date"], known["title"]) != (record["date"], record["title"])]
    known = [*others, record]
    _store(path, known)
    return write(path, [f"**{one['title']}**\n\n{table(one['rows'])}" for one in known], known)


def write(path: Path, parts: Sequence[str], records: Sequence[Record]) -> str:
    """Writes a page beside the records, of parts and the runs that its records came from, and returns it."""
    text = "\n\n".join([*filter(None, parts), runs(records)])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text + "\n")
    return text


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown of rows, a column for each key in the order of their coming; columns that no row fills are left out."""
    if not rows:
        return ""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)]
    cells = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def runs(records: Sequence[Record]) -> str:
    """Where, when, with which code and by which command the records came about."""
    found: dict[str, None] = {}
    for record in records:
        if "machine" in record:
            versions = ", ".join(f"{name} {version}" for name, version in record["machine"]["versions"].items())
            where = f"{record['machine']['device_name']}, {versions}"
            found[f"- {record['date'][:10]}, commit {record['commit']}, {where}: `{record['command']}`"] = None
    return "\n".join(["Runs:", "", *found])


def provenance(tree: Path = ROOT) -> dict[str, str]:
    """When, by which command and with which commit's code: what is needed to repeat a run, beside `machine`."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = f"torchrun --nproc-per-node {ranks}" if ranks else "python"
    return {
        "command": f"{launcher} -m benchmarks.{Path(sys.argv[0]).stem} {shlex.join(sys.argv[1:])}".strip(),
        "commit": commit(tree),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit(tree: Path = ROOT) -> str:
    """The commit of a tree in short, ``+changes`` behind it where files differ, or ``unknown``.

    Of this tree the environment variable ``LIGHTNING_EP_COMMIT`` says it first: a machine that it was copied to may
    have a ``.git`` of its own. A tree without one (of `git archive`) says it in a file ``.commit`` in its root.
    """
    if tree == ROOT and os.environ.get("LIGHTNING_EP_COMMIT"):
        return os.environ["LIGHTNING_EP_COMMIT"]
    if (tree / ".git").exists():
        git = ["git", "-C", str(tree)]
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        return name.strip() + ("+changes" if changes.strip() else "")
    written = tree / ".commit"
    return written.read_text().strip() if written.exists() else "unknown"


def machine(device: torch.device) -> Record:
    """Name of a torch device, and versions of Python and of the libraries in use."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = {"torch": str(torch.__version__)}  # with its build, which metadata may lack
    for library in ("lightning", "transformers", "peft", "torchtitan"):
        if library in sys.modules:
            versions[library] = importlib.metadata.version(library)
    return {"device_name": name, "versions": {**versions, "python": platform.python_version()}}


# ---------------------------------------------------------------------- tables of cells


def quantile(values: Sequence[float], q: float) -> float:
    """The ``q``-quantile, interpolated linearly."""
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


def rates(cell: Cell, steps_ms: Sequence[float]) -> dict[str, float]:
    """Tokens per second and GPU of steps of a cell: median, 10th and 90th percentile."""
    times = {"": statistics.median(steps_ms), "_p10": quantile(steps_ms, 0.9), "_p90": quantile(steps_ms, 0.1)}
    return {"step_ms": times[""]} | {f"tokens_per_second{of}": cell.tokens / ms * 1e3 for of, ms in times.items()}


def overview(records: Sequence[Record]) -> list[str]:
    """For every machine, depth and number of steps a row per cell, kernels by kind, and why cells failed."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        cell = _cell(record)
        title = f"**{cell.ranks} x {record['device_name']}, {cell.layers} layers of {cell.sizes}, "
        groups[f"{title}medians of {cell.steps} steps with the 10th and 90th percentile**"].append(record)
    parts = []
    for title, group in groups.items():
        done = [record for record in group if record["status"] == "ok"]
        kinds = [record for record in done if "by_kind" in record]
        parts += [f"{title}\n\n{table([_row(record, done) for record in done])}".strip()]
        parts += [table(_kinds(kinds)), _failed(group)]
    return parts


def comparison(records: Sequence[Record]) -> list[str]:
    """Records of `Cell.in_turns`: old and new of every cell beside each other; cells of which a turn failed say why."""
    cells: dict[Cell, list[Record]] = defaultdict(list)
    for record in records:
        if record["status"] == "ok":
            cells[dataclasses.replace(_cell(record), tree=None, turn=0)].append(record)
    rows = [_compared(cell, turns) for cell, turns in cells.items() if len(turns) == len(cell.in_turns("old"))]
    sides = {f"{'old' if r['cell']['tree'] else 'new'} is {r['commit']}": None for r in records}
    heading = f"**{', '.join(sides)}; medians of all steps of two turns, with the 10th and 90th percentile**"
    return [heading, table(rows), _failed(records)]


def best_peer(record: Record, records: Iterable[Record]) -> float | None:
    """Tokens per second of the fastest peer on the same shape and memory that recomputes as much; None if none ran."""

    def alike(cell: Cell) -> tuple[str, str]:
        return cell.shape, cell.recompute

    peers = [other for other in records if not _cell(other).ours and alike(_cell(other)) == alike(_cell(record))]
    return max((peer["tokens_per_second"] for peer in peers), default=None)


def _cell(record: Record) -> Cell:
    return Cell(**record["cell"])


def _row(record: Record, done: list[Record]) -> dict[str, str]:
    def shown(key: str, form: str) -> str:
        return "" if record.get(key) is None else format(record[key], form)

    cell, rate, peer = _cell(record), record["tokens_per_second"], best_peer(record, done)
    steps = enumerate(record["steps_ms"], cell.warmup + 1)
    watched = [ms for step, ms in steps if cell.monitor > 1 and step % cell.monitor == 0]
    estimate, reserved = record.get("estimate_tokens_per_second"), shown("peak_reserved_gib", ".1f")
    return {
        "trainer": cell.trainer,
        "per GPU": cell.shape,
        "tokens/s per GPU": _spread(record),
        "vs peer": f"{rate / peer:.2f}" if peer else "",
        "of estimate": f"{rate / estimate:.2f}" if estimate else "",
        "MFU": shown("mfu", ".1%"),
        "peak GiB (reserved)": f"{shown('peak_allocated_gib', '.1f')} ({reserved})" if reserved else "",
        "GiB, estimate": shown("estimate_peak_gib", ".1f"),
        "step ms": shown("step_ms", ".1f"),
        "of steps looked at": f"{statistics.median(watched):.1f}" if watched else "",
        "launch ms": shown("launch_ms", ".1f"),
        "GPU busy ms": shown("gpu_busy_ms", ".1f"),
        "exposed ms": shown("exposed_communication_ms", ".1f"),
        "hottest": shown("max_over_mean_tokens_per_expert", ".2f"),
        "loss": f"{record['first_loss']:.2f} to {record['last_loss']:.2f}",
    }


def _kinds(records: list[Record]) -> list[dict[str, str]]:
    kinds = list(dict.fromkeys(kind for record in records for kind in record["by_kind"]))  # each largest first
    return [
        {
            "GPU ms of a step by kind of kernel (rank 0)": _cell(record).trainer,
            "per GPU": _cell(record).shape,
            **{kind: f"{record['by_kind'].get(kind, 0.0):.1f}" for kind in kinds},
            "launches": str(record["launches"]),
        }
        for record in records
    ]


def _failed(records: Sequence[Record]) -> str:
    failed = [record for record in records if record["status"] != "ok"]
    return "\n".join(f"- {_cell(record).label}: {record['status']}: `{record['error']}`" for record in failed)


def _spread(rate: Record) -> str:
    """Median of tokens per second, with the 10th and 90th percentile."""
    low, high = rate["tokens_per_second_p10"], rate["tokens_per_second_p90"]
    return f"{rate['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"


def _compared(cell: Cell, turns: list[Record]) -> dict[str, str]:
    turns = sorted(turns, key=lambda record: record["cell"]["turn"])
    sides = [[r for r in turns if r["cell"]["tree"]], [r for r in turns if not r["cell"]["tree"]]]
    old, new = (rates(cell, [ms for record in side for ms in record["steps_ms"]]) for side in sides)
    pairs = [new["tokens_per_second"] / old["tokens_per_second"] for old, new in zip(*sides, strict=True)]
    peaks = [max(record.get("peak_allocated_gib", 0.0) for record in side) for side in sides]
    return {
        "trainer": cell.trainer,
        "per GPU": cell.shape,
        "old tokens/s per GPU": _spread(old),
        "new tokens/s per GPU": _spread(new),
        "new / old": f"{new['tokens_per_second'] / old['tokens_per_second']:.3f}",
        "by turns": ", ".join(f"{pair:.3f}" for pair in pairs),
        **{f"{name} peak GiB": f"{peak:.1f}" if peak else "" for name, peak in zip(("old", "new"), peaks, strict=True)},
    }
