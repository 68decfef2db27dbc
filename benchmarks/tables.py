"""Tables of records in Markdown: cells beside each other, kinds of kernels, a commit beside another, and their runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.cells import Cell
from benchmarks.measure import rates

Record = dict[str, Any]


def lines(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table; columns that no row fills are left out."""
    filled = [index for index, _ in enumerate(header) if any(row[index] for row in rows)]
    all_rows = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(row[index] for index in filled) + " |" for row in all_rows]


def table(records: Sequence[Record]) -> str:
    """A table for every machine, depth and number of steps, a row per cell; kernels by kind; why cells failed; runs."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_title(record), []).append(record)
    return "\n\n".join([*(_group(title, group) for title, group in groups.items()), runs(records)])


def _title(record: Record) -> str:
    cell = Cell(**record["cell"])
    return (
        f"**{cell.ranks} x {record['device_name']}, {cell.layers} layers of {cell.sizes}, "
        f"medians of {cell.steps} steps with the 10th and 90th percentile**"
    )


def _group(title: str, records: list[Record]) -> str:
    done = [record for record in records if record["status"] == "ok"]
    parts = [[title]]
    if done:
        rows = [[form(record, done) for _, form in _COLUMNS] for record in done]
        parts.append(lines([name for name, _ in _COLUMNS], rows))
    if any("by_kind" in record for record in done):
        parts.append(_kinds([record for record in done if "by_kind" in record]))
    failed = [record for record in records if record["status"] != "ok"]
    if failed:
        parts.append([f"- {Cell(**r['cell']).label}: {r['status']}: `{r['error']}`" for r in failed])
    return "\n\n".join("\n".join(part) for part in parts)


def best_peer(record: Record, records: Iterable[Record]) -> float | None:
    """Tokens per second of the fastest peer on the same shape and memory; None if none ran.

    Of peers that recompute if the record does, and of the others if it does not; where there are none, of all: who
    does not fit otherwise has to recompute.
    """
    cell = Cell(**record["cell"])
    found: dict[bool, list[float]] = {True: [], False: []}
    for other in records:
        peer = Cell(**other["cell"])
        if not peer.ours and peer.shape == cell.shape:
            found[peer.recompute == "none"].append(other["tokens_per_second"])
    alike = cell.recompute == "none"
    return max(found[alike] or found[not alike], default=None)


def _kinds(records: list[Record]) -> list[str]:
    kinds = list(dict.fromkeys(kind for record in records for kind in record["by_kind"]))  # each largest first
    rows = []
    for record in records:
        cell = Cell(**record["cell"])
        times = [f"{record['by_kind'].get(kind, 0.0):.1f}" for kind in kinds]
        rows.append([cell.trainer, cell.shape, *times, str(record["launches"])])
    return lines(["GPU ms of a step by kind of kernel (rank 0)", "per GPU", *kinds, "launches"], rows)


# ---------------------------------------------------------------------- columns

Form = Callable[[Record, list[Record]], str]


def _number(key: str, form: str) -> Form:
    return lambda record, _: "" if record.get(key) is None else format(record[key], form)


def spread(rate: dict[str, float]) -> str:
    """Median of tokens per second, with the 10th and 90th percentile."""
    low, high = rate["tokens_per_second_p10"], rate["tokens_per_second_p90"]
    return f"{rate['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"


def _vs_peer(record: Record, records: list[Record]) -> str:
    peer = best_peer(record, records)
    return "" if peer is None else f"{record['tokens_per_second'] / peer:.2f}"


def _of_estimate(record: Record, _: list[Record]) -> str:
    estimate = record.get("estimate_tokens_per_second")
    return "" if estimate is None else f"{record['tokens_per_second'] / estimate:.2f}"


def _peak(record: Record, _: list[Record]) -> str:
    if "peak_allocated_gib" not in record:
        return ""
    return f"{record['peak_allocated_gib']:.1f} ({record['peak_reserved_gib']:.1f})"


_COLUMNS: list[tuple[str, Form]] = [
    ("trainer", lambda record, _: record["cell"]["trainer"]),
    ("per GPU", lambda record, _: Cell(**record["cell"]).shape),
    ("tokens/s per GPU", lambda record, _: spread(record)),
    ("vs peer", _vs_peer),
    ("of estimate", _of_estimate),
    ("MFU", _number("mfu", ".1%")),
    ("peak GiB (reserved)", _peak),
    ("GiB, estimate", _number("estimate_peak_gib", ".1f")),
    ("step ms", _number("step_ms", ".1f")),
    ("launch ms", _number("launch_ms", ".1f")),
    ("GPU busy ms", _number("gpu_busy_ms", ".1f")),
    ("exposed ms", _number("exposed_communication_ms", ".1f")),
    ("hottest", _number("max_over_mean_tokens_per_expert", ".2f")),
    ("loss", lambda record, _: f"{record['first_loss']:.2f} to {record['last_loss']:.2f}"),
]


# ---------------------------------------------------------------------- two commits


def comparison(records: Sequence[Record]) -> str:
    """Records of `Cell.in_turns`: old and new of every cell beside each other; cells of which a turn failed say why."""
    cells: dict[Cell, list[Record]] = {}
    for record in records:
        cell = dataclasses.replace(Cell(**record["cell"]), tree=None, turn=0)
        cells.setdefault(cell, []).append(record)
    rows, failed = [], []
    for cell, turns in cells.items():
        failed += [f"- {Cell(**r['cell']).label}: {r['status']}: `{r['error']}`" for r in turns if r["status"] != "ok"]
        done = {record["cell"]["turn"]: record for record in turns if record["status"] == "ok"}
        if len(done) == len(cell.in_turns("old")):
            rows.append(_compared(cell, [done[turn] for turn in sorted(done)]))
    header = ["trainer", "per GPU", "old tokens/s per GPU", "new tokens/s per GPU", "new / old", "by turns"]
    header += ["old peak GiB", "new peak GiB"]
    sides = {f"{'old' if r['cell']['tree'] else 'new'} is {r['commit']}": None for r in records}
    heading = f"**{', '.join(sides)}; medians of all steps of two turns, with the 10th and 90th percentile**"
    parts = [[heading], lines(header, rows) if rows else [], failed, [runs(records)]]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _compared(cell: Cell, turns: list[Record]) -> list[str]:
    sides = [[r for r in turns if r["cell"]["tree"]], [r for r in turns if not r["cell"]["tree"]]]
    old, new = (rates(cell, [ms for record in side for ms in record["steps_ms"]]) for side in sides)
    pairs = [new["tokens_per_second"] / old["tokens_per_second"] for old, new in zip(*sides, strict=True)]
    peaks = [max(record.get("peak_allocated_gib", 0.0) for record in side) for side in sides]
    ratio, by_turns = new["tokens_per_second"] / old["tokens_per_second"], ", ".join(f"{pair:.3f}" for pair in pairs)
    shown = (f"{peak:.1f}" if peak else "" for peak in peaks)
    return [cell.trainer, cell.shape, spread(old), spread(new), f"{ratio:.3f}", by_turns, *shown]


def runs(records: Sequence[Record]) -> str:
    """Where, when, with which code and by which command the records came about."""
    found: dict[str, None] = {}
    for record in records:
        if "machine" in record:
            versions = ", ".join(f"{name} {version}" for name, version in record["machine"]["versions"].items())
            where = f"{record['machine']['device_name']}, {versions}"
            found[f"- {record['date'][:10]}, commit {record['commit']}, {where}: `{record['command']}`"] = None
    return "\n".join(["Runs:", "", *found])
