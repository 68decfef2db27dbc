"""What is kept of a run: JSON lines, appended as soon as something is measured, with all that it takes to repeat it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
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
    made.add_argument("--json", type=Path, default=Path("runs/benchmarks", f"{name}.jsonl"), help="records, with a "
        "table beside them")  # fmt: skip
    return made


def read(path: Path) -> list[Record]:
    """The records of a file, none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: Record) -> None:
    """Adds a record; a kill leaves the file with it or without it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(known) + "\n" for known in [*read(path), record]))
    part.replace(path)


def find(path: Path, cell: Cell, device_name: str) -> Record | None:
    """The last record of a cell on a device, or None; a field of `Cell` that it was written without has its default."""
    for record in reversed(read(path)):
        if (Cell(**record["cell"]), record["device_name"]) == (cell, device_name):
            return record
    return None


def publish(path: Path, title: str, rows: list[dict[str, str]], device: torch.device) -> None:
    """Appends a record of the rows of a table, and prints and writes all tables of its file."""
    append(path, {**provenance(), "machine": machine(device), "title": title, "rows": rows})
    known = read(path)
    write(path, [f"**{record['title']}**\n\n{table(record['rows'])}" for record in known], known)


def write(path: Path, parts: Sequence[str], records: Sequence[Record]) -> None:
    """Prints parts of a page and the runs that their records came from, and writes both beside the records."""
    text = "\n\n".join([*filter(None, parts), runs(records)])
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text + "\n")


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown of rows, a column for each key in the order of their coming; columns that no row fills are left out."""
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
