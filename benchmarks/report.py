"""Tables and the page of results: ``python -m benchmarks.report --train A.jsonl --node B.jsonl --moe C --loss D``."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import markdown
from benchmarks.cells import Cell
from benchmarks.node_report import node_section
from benchmarks.records import latest, read

PAGE = Path("docs/performance.md")
_NOTHING = "Not measured yet: this page is written from the files of a run, and none was given."

_INTRODUCTION = """# Performance

Written by `python -m benchmarks.report` from the files of the runs named below; nothing on this page is typed by hand.

- *tokens/s* are distinct tokens per second and GPU: the median over measured steps, with the 10th and 90th percentile.
  A step lasts from the end of one optimizer step to the end of the next, on the slowest rank, data loading included.
- *vs peer* is the ratio to the fastest peer of the same case, whatever its layout; nothing if none ran.
- *+compile*, *+full* and *+selective* behind a trainer: decoder layers compiled; layers recomputed (a case of
  its own: transformers' and torchtitan's activation checkpointing beside ours). *,cp=2* or *,tp=2*: two GPUs share
  what the title counts per GPU.
- *MFU* counts causal attention and active experts, no recompute, against 989 TFLOP/s.
- *estimate* is the budget of measured parts, scaled to the case (`benchmarks/costs.py`): compute and memory
  traffic at the rates seen on an H200, without launch overhead and exposed gathers. It was written down before the run.
- *peak* is the allocator's largest allocation in the measured steps, in GiB (in brackets: reserved).
- *launch* is the time until the host has launched a step, *CPU* the processor time of that, both with a
  synchronisation before each step; *GPU busy* and *exposed* (communication that no computation hides) come from one
  profiled step.
- *hottest* is the most popular expert's tokens over the mean.
- Every trainer sees the same random tokens, the same distribution of random weights, AdamW, clipping at norm 1: ours
  with `lightning_ep.AdamW`, peers with `torch.optim.AdamW(fused=True)`.

To repeat it, from the root of the repository, on any number of GPUs of one node; each command says more with `--help`:

```bash
python -m benchmarks.train --tokens 4x4096 1x16384 1x4096 --router balanced skewed  # repeat until all cells are done
python -m benchmarks.node  # all GPUs of the node at full depth; repeat until it exits with 0
python -m benchmarks.moe_layer && python -m benchmarks.loss
r=runs/benchmarks
python -m benchmarks.report --train $r/train.jsonl --node $r/node.jsonl --moe $r/moe_layer.json --loss $r/loss.json
```

The peers are transformers, which the package needs anyway, and torchtitan and Liger where they are installed.
"""

Column = tuple[str, Callable[[dict[str, Any]], str]]


def _number(key: str, form: str = ",.0f") -> Callable[[dict[str, Any]], str]:
    return lambda record: "" if record.get(key) is None else format(record[key], form)


def _rate(record: dict[str, Any]) -> str:
    if "tokens_per_second" not in record:
        return ""
    low, high = record["tokens_per_second_p10"], record["tokens_per_second_p90"]
    return f"{record['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})"


def _peak(record: dict[str, Any]) -> str:
    if "peak_allocated_gib" not in record:
        return ""
    return f"{record['peak_allocated_gib']:.1f} ({record['peak_reserved_gib']:.1f})"


def _loss(record: dict[str, Any]) -> str:
    return f"{record['first_loss']:.2f} to {record['last_loss']:.2f}" if "first_loss" in record else ""


def _gb_per_second(what: str) -> Callable[[dict[str, Any]], str]:
    return lambda r: f"{r[what]:.1f} s, {r['gb'] / r[what]:.2f} GB/s" if what in r else ""


_COLUMNS: list[Column] = [
    ("tokens/s per GPU", _rate),
    ("vs peer", _number("ratio", ".2f")),
    ("estimate", _number("estimate_tokens_per_second")),
    ("MFU", _number("mfu", ".1%")),
    ("peak GiB", _peak),
    ("step ms", _number("step_ms", ".1f")),
    ("launch ms", _number("launch_ms", ".1f")),
    ("CPU ms", _number("process_cpu_ms", ".1f")),
    ("GPU busy ms", _number("gpu_busy_ms", ".1f")),
    ("exposed ms", _number("exposed_communication_ms", ".1f")),
    ("hottest", _number("max_over_mean_tokens_per_expert", ".2f")),
    ("loss", _loss),
    ("GB", _number("gb", ".1f")),
    ("saved in", _gb_per_second("save_s")),
    ("loaded in", _gb_per_second("load_s")),
]


def cases(records: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Records grouped by everything but the trainer and by device, each with its ratio to the best peer."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        case = json.dumps([Cell(**record["cell"]).case, record["device_name"]], sort_keys=True)
        groups.setdefault(case, []).append(dict(record))
    for group in groups.values():
        peers = [r["tokens_per_second"] for r in group if r["status"] == "ok" and not is_ours(r)]
        for record in group:
            if peers and record["status"] == "ok":
                record["ratio"] = record["tokens_per_second"] / max(peers)
    return list(groups.values())


def is_ours(record: dict[str, Any]) -> bool:
    """Whether it is no peer's."""
    return Cell(**record["cell"]).ours


def title(group: list[dict[str, Any]]) -> str:
    """What a case is."""
    cell = Cell(**group[0]["cell"])
    cap = "" if cell.memory_cap_gib is None else f", memory capped to {cell.memory_cap_gib:g} GiB"
    recompute = ", recompute" if cell.recompute != "none" else ""
    gpus = f"{cell.ranks} process{'es' if cell.ranks > 1 else ''}"
    if cell.task == "weights":
        return f"Weights in bf16 in the hub's layout, {gpus}, {cell.layers} layers of {cell.sizes}"
    return (
        f"{cell.batch} x {cell.sequence:,} tokens per GPU, {gpus}, {cell.layers} layers of {cell.sizes}, "
        f"{cell.precision}, {cell.router} router, {cell.steps} steps{cap}{recompute}"
    )


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: one table per case, a row per trainer; cells that failed say why."""
    return "\n\n".join(_case_table(group) for group in cases(records))


def _case_table(group: list[dict[str, Any]]) -> str:
    done = [record for record in group if record["status"] == "ok"]
    # A column that nobody fills (no GPU, no peer) is left out.
    columns = [(name, form) for name, form in _COLUMNS if any(map(form, done))] or _COLUMNS[:1]
    rows = []
    for record in group:
        values = [form(record) for _, form in columns] if record in done else [record["status"]]
        rows.append([record["cell"]["trainer"], *values, *[""] * (len(columns) - len(values))])
    lines = [f"**{title(group)}** ({group[0]['device_name']})", ""]
    lines += markdown.lines(["trainer", *(name for name, _ in columns)], rows)
    if any("by_stage" in record for record in done):
        lines += ["", *_stage_table(done)]
    failures = [f"- {r['cell']['trainer']}: {r['status']}: `{r['error']}`" for r in group if r not in done]
    return "\n".join([*lines, *([""] if failures else []), *failures])


def _stage_table(records: list[dict[str, Any]]) -> list[str]:
    totals: dict[str, float] = {}
    for record in records:
        for kind, ms in record.get("by_stage", {}).items():
            totals[kind] = max(totals.get(kind, 0.0), ms)
    kinds = sorted(totals, key=lambda kind: -totals[kind])
    rows = [
        [r["cell"]["trainer"], *(f"{r.get('by_stage', {}).get(kind, 0.0):.1f}" for kind in kinds), str(r["launches"])]
        for r in records
    ]
    return markdown.lines(["GPU ms of a step by kind of kernel (rank 0)", *kinds, "launches"], rows)


def moe_table(content: dict[str, Any]) -> str:
    """Markdown of `benchmarks.moe_layer`'s result."""
    rows = []
    for row in content["rows"]:
        parts = row["stages"] or {"busy_ms": float("nan"), "launches": 0, "by_stage": {}}
        kinds = ", ".join(f"{name} {ms:.2f}" for name, ms in parts["by_stage"].items())
        busy = f"{parts['busy_ms']:.2f}" if row["stages"] else ""
        rows.append([row["name"], row["router"], f"{row['max_over_mean']:.2f}", _spread(row), busy, kinds])
    header = ["MoE body, forward and backward", "router", "hottest", "ms", "GPU busy ms", "of it by kind of kernel"]
    budget = "Budget at 16,384 tokens on an H200: GEMMs 6.0 ms, glue 1.7 ms; the target is 8.0 ms."
    sizes = f"{content['tokens']:,} tokens, ep=1, {content['dtype']}."
    return "\n".join([*markdown.lines(header, rows), "", f"{sizes} {budget}"])


def loss_table(content: dict[str, Any]) -> str:
    """Markdown of `benchmarks.loss`'s result."""
    rows = []
    for row in content["rows"]:
        if "error" in row:
            rows.append([row["name"], row["error"], "", "", ""])
            continue
        memory = f"{row['memory_gib']:.2f}" if "memory_gib" in row else ""
        busy = f"{row['stages']['busy_ms']:.1f}" if row["stages"] else ""
        rows.append([row["name"], _spread(row), busy, memory, f"{row['relative_difference']:.1e}"])
    header = ["loss, forward and backward", "ms", "GPU busy ms", "GiB above weight and gradients", "difference to fp32"]
    sizes = f"{content['tokens']:,} tokens, hidden size {content['hidden']:,}, vocabulary {content['vocab']:,}."
    return "\n".join([*markdown.lines(header, rows), "", f"{sizes} The target is 60 ms and under 3 GiB."])


def _spread(row: dict[str, float]) -> str:
    return f"{row['ms']:.2f} ({row['p10']:.2f} to {row['p90']:.2f})"


def page(
    train: list[dict[str, Any]],
    node: list[dict[str, Any]],
    moe: list[dict[str, Any]],
    loss: list[dict[str, Any]],
    plot: str | None,
) -> str:
    """The whole of ``docs/performance.md``.

    Args:
        train: Records of `benchmarks.train`.
        node: Records of `benchmarks.node`.
        moe: Results of `benchmarks.moe_layer`.
        loss: Results of `benchmarks.loss`.
        plot: File name of the plot beside the page, if there is one.
    """
    parts = [_INTRODUCTION, "## Training step\n"]
    if plot is not None:
        parts.append(f"![tokens per second and GPU]({plot})\n")
    parts.append((table(train) + "\n\n" + _provenance(train) if train else _NOTHING) + "\n")
    parts.append("## Eight GPUs\n\n" + node_section(node, train) + "\n")
    if node:
        parts.append(_provenance(node) + "\n")
    for heading, form, results in (("MoE layer", moe_table, moe), ("Loss", loss_table, loss)):
        parts.append(f"## {heading} alone\n")
        parts.append("\n\n".join(f"{form(r)}\n\n{_provenance([r])}" for r in results) or _NOTHING)
        parts[-1] += "\n"
    return "\n".join(parts)


def _provenance(results: Sequence[dict[str, Any]]) -> str:
    lines = []
    for result in results:
        machine = result.get("machine")
        if machine is None:
            continue
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        line = f"- {result['date'][:10]}, {machine['device_name']}, {versions}: `{result['command']}`"
        if line not in lines:
            lines.append(line)
    return "\n".join(["Runs:", "", *lines])


def draw(records: Sequence[dict[str, Any]], path: Path) -> bool:
    """Bars of tokens per second by case and trainer, the estimate as a line; False if matplotlib is not installed."""
    done = [[r for r in group if r["status"] == "ok" and "tokens_per_second" in r] for group in cases(records)]
    groups = [group for group in done if group]
    if not groups or importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(groups), 1, figsize=(8, 1.2 + 1.1 * sum(map(len, groups)) / 2), squeeze=False)
    for axis, group in zip(axes[:, 0], groups, strict=True):
        names = [record["cell"]["trainer"] for record in group]
        rates = [record["tokens_per_second"] for record in group]
        colors = ["#c44e52" if is_ours(record) else "#8c8c8c" for record in group]
        axis.barh(names, rates, color=colors)
        for index, record in enumerate(group):
            if record.get("estimate_tokens_per_second") is not None:
                axis.vlines(record["estimate_tokens_per_second"], index - 0.4, index + 0.4, "black", "dotted")
        axis.invert_yaxis()
        axis.set_title(f"{title(group)}, {group[0]['device_name']}", fontsize=7)
        axis.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("tokens per second and GPU (dotted: estimate)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def main(arguments: list[str] | None = None) -> None:
    """Writes the page and the plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    for name in ("--train", "--node", "--moe", "--loss"):
        parser.add_argument(name, type=Path, nargs="*", default=[])
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    # Later files and lines replace earlier ones of the same cell on the same device.
    train, node = (
        list(latest([record for path in paths for record in read(path)]).values())
        for paths in (options.train, options.node)
    )
    moe, loss = ([json.loads(path.read_text()) for path in paths] for paths in (options.moe, options.loss))
    plot = options.page.with_suffix(".png")
    drawn = draw(train, plot)
    options.page.write_text(page(train, node, moe, loss, plot.name if drawn else None))
    print(f"wrote {options.page}" + (f" and {plot}" if drawn else "; no plot"))


if __name__ == "__main__":
    main()
