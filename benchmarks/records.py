"""The file of results: JSON lines, one record per cell, appended as soon as a cell is done."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, none if it does not exist; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
    return records


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds a record, after removing a last line that a kill cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    whole = "".join(json.dumps(known) + "\n" for known in read(path))
    if text != whole:
        path.write_text(whole)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def latest(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last record of every cell on every device, in the order of first appearance."""
    return {key(record["cell"], record["device_name"]): record for record in records}


def key(cell: dict[str, Any], device: str) -> str:
    """What makes a record replace another; a field of `Cell` that it was written without has its default."""
    return json.dumps([dataclasses.asdict(Cell(**cell)), device], sort_keys=True)
