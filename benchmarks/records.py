"""The file of results, JSON lines that are appended as soon as a cell is done; and what a record says of its run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell

ROOT = Path(__file__).resolve().parents[1]


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds a record; a kill leaves the file with it or without it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(known) + "\n" for known in [*read(path), record]))
    part.replace(path)


def find(path: Path, cell: Cell, device_name: str) -> dict[str, Any] | None:
    """The last record of a cell on a device, or None; a field of `Cell` that it was written without has its default."""
    for record in reversed(read(path)):
        if (Cell(**record["cell"]), record["device_name"]) == (cell, device_name):
            return record
    return None


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


def machine(device: Any) -> dict[str, Any]:
    """Name of a torch device, and versions of Python and of the libraries in use."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = {"torch": str(torch.__version__)}  # with its build, which metadata may lack
    for library in ("lightning", "transformers", "peft", "torchtitan"):
        if library in sys.modules:
            versions[library] = importlib.metadata.version(library)
    return {"device_name": name, "versions": {**versions, "python": platform.python_version()}}
