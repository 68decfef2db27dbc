"""Tables of cells in Markdown: beside each other, by kinds of kernels, and a commit beside another."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.cells import Cell
from benchmarks.measure import rates
from benchmarks.records import Record, table


def overview(records: Sequence[Record]) -> list[str]:
    """For every machine, depth and number of steps a row per cell, kernels by kind, and why cells failed."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        cell = Cell(**record["cell"])
        title = f"**{cell.ranks} x {record['device_name']}, {cell.layers} layers of {cell.sizes}, "
        title += f"medians of {cell.steps} steps with the 10th and 90th percentile**"
        groups.setdefault(title, []).append(record)
    parts = []
    for title, group in groups.items():
        done = [record for record in group if record["status"] == "ok"]
        kinds = [record for record in done if "by_kind" in record]
        parts += [f"{title}\n\n{table([_row(record, done) for record in done])}" if done else title]
        parts += [table(_kinds(kinds)) if kinds else "", _failed(group)]
    return parts


def comparison(records: Sequence[Record]) -> list[str]:
    """Records of `Cell.in_turns`: old and new of every cell beside each other; cells of which a turn failed say why."""
    cells: dict[Cell, list[Record]] = {}
    for record in records:
        cell = dataclasses.replace(Cell(**record["cell"]), tree=None, turn=0)
        cells.setdefault(cell, []).append(record)
    rows = []
    for cell, turns in cells.items():
        done = {record["cell"]["turn"]: record for record in turns if record["status"] == "ok"}
        if len(done) == len(cell.in_turns("old")):
            rows.append(_compared(cell, [done[turn] for turn in sorted(done)]))
    sides = {f"{'old' if r['cell']['tree'] else 'new'} is {r['commit']}": None for r in records}
    heading = f"**{', '.join(sides)}; medians of all steps of two turns, with the 10th and 90th percentile**"
    return [heading, table(rows) if rows else "", _failed(records)]


def best_peer(record: Record, records: Iterable[Record]) -> float | None:
    """Tokens per second of the fastest peer on the same shape and memory that recomputes as much; None if none ran."""
    cell = Cell(**record["cell"])
    peers = [(Cell(**other["cell"]), other["tokens_per_second"]) for other in records]
    alike = [
        rate for peer, rate in peers if (peer.shape, peer.recompute) == (cell.shape, cell.recompute) and not peer.ours
    ]
    return max(alike, default=None)


def _row(record: Record, done: list[Record]) -> dict[str, str]:
    def shown(key: str, form: str) -> str:
        return "" if record.get(key) is None else format(record[key], form)

    cell, rate, peer = Cell(**record["cell"]), record["tokens_per_second"], best_peer(record, done)
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
    rows = []
    for record in records:
        cell = Cell(**record["cell"])
        row = {"GPU ms of a step by kind of kernel (rank 0)": cell.trainer, "per GPU": cell.shape}
        row |= {kind: f"{record['by_kind'].get(kind, 0.0):.1f}" for kind in kinds}
        rows.append({**row, "launches": str(record["launches"])})
    return rows


def _failed(records: Sequence[Record]) -> str:
    failed = [record for record in records if record["status"] != "ok"]
    return "\n".join(f"- {Cell(**r['cell']).label}: {r['status']}: `{r['error']}`" for r in failed)


def _spread(rate: Record) -> str:
    """Median of tokens per second, with the 10th and 90th percentile."""
    low, high = rate["tokens_per_second_p10"], rate["tokens_per_second_p90"]
    return f"{rate['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"


def _compared(cell: Cell, turns: list[Record]) -> dict[str, str]:
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
