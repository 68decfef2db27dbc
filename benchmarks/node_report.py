"""Estimates and measurements of a node's cells side by side, and how far the estimates were off elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import markdown
from benchmarks.cells import Cell
from benchmarks.estimates import estimates, limit_gib
from benchmarks.matrix import MARKS, node_matrix
from benchmarks.records import key, latest

_NODE = """`python -m benchmarks.node` measures these cells on all GPUs of a node, unattended: the model at full depth,
bf16 compute with fp32 masters, clipping, everything compiled. A call takes nine minutes at most; the same
command goes on where it stopped and exits with 0 when every cell is recorded. A cell that fails or runs out
of memory is recorded as that. Each has a time-out of its own, 4 minutes for training (4 steps to warm up, 8
measured) and 5 for the weights. `--layers` cuts the depth, `--ranks` the GPUs, and `--device cpu --sizes tiny
--layers 1` tries the command without any.

- *estimate*: `benchmarks/costs.py` and `benchmarks/estimates.py`, written into each record before the cell
  runs; "-" where nothing can be derived (peers). *of estimate* is the measured rate over it.
- *rehearsed*: rank 0 of 8 by itself on one H200 (`--rehearse --ranks 8`, `benchmarks/rehearsal.py`), with the
  whole depth, its share of the parameters, all launches, arithmetic and copies, and its own data in place of what
  its peers would send. There is no network and nobody to wait for: rates are upper bounds, and high above what
  links allow where experts are gathered (ep < 8, FSDP2). In brackets: over the fastest rehearsed peer.
- *vs peer*: over the fastest peer at the same tokens per GPU, router and memory, whatever either recomputes.
  Peers recompute where they would not fit otherwise.
- *GiB*: largest allocation; after "of" what a GPU can allocate, the rest of it left to CUDA, NCCL and
  fragmentation.
- *weights*: written in the hub's layout in bf16 by all ranks and synced, dropped from the page cache,
  streamed into fp32 shards, compared bit for bit. The estimate is the disk of an earlier machine (see
  [checkpoints.md](checkpoints.md#speed)).
- *not run yet*: no machine with 8 GPUs was lent."""

_MODEL = """What the estimates assume beyond the measured parts, which are of 2 GPUs without recompute:

- *Recompute*: `selective` repeats the forward of attention and norms; `full` also the up projection, a
  permutation and one of four exchanges. Neither routes again or gathers weights again.
- *Exchange*: one row per token and other rank that holds any of its experts (4.6 rows at ep=8, 1.0 at ep=2),
  at the rate that was measured, 335 GB/s per GPU and direction, and as if nothing hid it.
- *FSDP of experts* (ep < GPUs): two gathers in bf16 and one reduction in fp32 per layer over the same links,
  hidden under the layer's arithmetic as far as that lasts; FSDP's copies around them, 48 bytes per gathered
  parameter by a rehearsal of ep=1, are not hidden.
- *Weights*: what AdamW, the norm and the casts read and write, at 85 % of the bandwidth; without FSDP of
  experts their gradients are in bf16. Casts count as two even where copies are kept. *Host*: 25 ms per step and
  6 per layer (8 with recompute), from a rehearsal; with an exchange of tokens it waits for the optimizer step in
  the next step's first layer. Where that is longer than all GPU work, it is the estimate: in the cells of 1 x 4096.
- *Memory*: 16 bytes per parameter over all GPUs, 14 for experts without FSDP and 2 for their copies where
  these are kept; per token and layer 8 KiB of input and routing, 35 of compiled attention, and the experts'
  received rows (4 KiB each, one of them at ep=1, 5.3 at ep=8) and 24 KiB; the loss, or the layer at work. The 8
  and the 35 KiB were fitted to runs at 4 x 4096 on one GPU, before the gradients of experts stayed in bf16.
- Not known to it: skew, the fixed costs of small shapes, collectives that slow the arithmetic that hides
  them.

The same code for cells measured on one GPU:"""


def node_section(records: list[dict[str, Any]], train: list[dict[str, Any]]) -> str:
    """Estimates and measurements of `benchmarks.node`, and how far the estimates were off elsewhere.

    Args:
        records: Records of `benchmarks.node`, on any number of GPUs and of any depth; the full matrix on 8 x H200 is
            shown in any case.
        train: Records of `benchmarks.train`.
    """
    runs = {(r["device_name"], r["cell"]["ranks"], r["cell"]["layers"]): None for r in records}
    parts = [_NODE]
    for device, ranks, layers in {("NVIDIA H200", 8, 48): None, **runs}:
        parts += [f"**{ranks} x {device}, {layers} layers**", matrix_table(node_matrix(ranks, layers), records, device)]
    return "\n\n".join([*parts, _MODEL, model_table(train)])


def matrix_table(matrix: Mapping[str, Cell], records: Sequence[dict[str, Any]], device_name: str) -> str:
    """Markdown: estimate and measurement of every named cell side by side, then the published marks.

    Args:
        matrix: The cells by name.
        records: What was measured, of any cells.
        device_name: The device of the matrix.
    """
    known = latest(list(records))
    rows = []
    for name, cell in matrix.items():
        record = known.get(key(vars(cell), device_name), {})
        rows.append(_matrix_row(name, cell, record, _best_peer(cell, matrix, known, device_name), device_name))
    header = ["cell", "trainer", "per GPU", "estimate", "measured", "of estimate", "vs peer", "GiB, estimate", "GiB"]
    alone = {name: cell.rehearsal for name, cell in matrix.items() if cell.can_rehearse}
    if any(key(vars(cell), device_name) in known for cell in alone.values()):
        header[4:4] = ["rehearsed", "GiB, rehearsed"]
        for name, row in zip(matrix, rows, strict=True):
            row[4:4] = _rehearsed(alone[name], alone, known, device_name) if name in alone else ["", ""]
    marks = [[m.who, m.hardware, m.setting, f"{m.tokens_per_second:,.0f}"] for m in MARKS]
    published = ["published elsewhere, not measured here", "hardware", "setting", "tokens/s per GPU"]
    return "\n".join([*markdown.lines(header, rows), "", *markdown.lines(published, marks)])


def _best_peer(
    cell: Cell, matrix: Mapping[str, Cell], known: Mapping[str, dict[str, Any]], device_name: str
) -> float | None:
    """The fastest peer at the same shape, router and memory, whatever either recomputes: each is there at its best."""
    rates = []
    for other in matrix.values():
        same = (other.shape, other.router, other.memory_cap_gib) == (cell.shape, cell.router, cell.memory_cap_gib)
        record = known.get(key(vars(other), device_name), {})
        if same and not other.ours and "tokens_per_second" in record:
            rates.append(record["tokens_per_second"])
    return max(rates, default=None)


def _rehearsed(
    cell: Cell, matrix: Mapping[str, Cell], known: Mapping[str, dict[str, Any]], device_name: str
) -> list[str]:
    record = known.get(key(vars(cell), device_name), {})
    rate = record.get("tokens_per_second")
    if rate is None:
        return [record.get("status", ""), ""]
    peer = _best_peer(cell, matrix, known, device_name) if cell.ours else None
    memory = f"{record['peak_allocated_gib']:.1f}" if "peak_allocated_gib" in record else ""
    return [f"{rate:,.0f}" + (f" ({rate / peer:.2f})" if peer else ""), memory]


def _matrix_row(name: str, cell: Cell, record: dict[str, Any], peer: float | None, device_name: str) -> list[str]:
    # What the record holds was written before the run.
    guess = {**estimates(cell, device_name), **{k: v for k, v in record.items() if k.startswith("estimate_")}}
    if cell.task == "weights":
        estimate = _both(guess.get("estimate_save_s"), guess.get("estimate_load_s"))
        measured = record.get("status", "not run yet")
        if measured == "ok":
            measured = _both(record["save_s"], record["load_s"])
        return [name, cell.trainer, "weights", estimate, measured, "", "", "", ""]
    estimate, rate = guess["estimate_tokens_per_second"], record.get("tokens_per_second")
    memory, limit = guess["estimate_peak_gib"], limit_gib(cell, device_name)
    fits = "" if memory is None or limit is None else f" of {limit:.0f}" + (", too much" if memory > limit else "")
    return [
        name,
        cell.trainer,
        cell.shape,
        "-" if estimate is None else f"{estimate:,.0f}",
        record.get("status", "not run yet") if rate is None else f"{rate:,.0f}",
        f"{rate / estimate:.2f}" if rate and estimate else "",
        f"{rate / peer:.2f}" if rate and peer else "",
        "-" if memory is None else f"{memory:.1f}{fits}",
        f"{record['peak_allocated_gib']:.1f}" if "peak_allocated_gib" in record else "",
    ]


def _both(save_s: float | None, load_s: float | None) -> str:
    return "-" if save_s is None or load_s is None else f"save {save_s:,.0f} s, load {load_s:,.0f} s"


def model_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: what `benchmarks.costs` and `benchmarks.estimates` say of cells of ours that were measured."""
    rows = []
    for record in records:
        cell = Cell(**record["cell"])
        guess = estimates(cell, record["device_name"])
        rate, memory = guess.get("estimate_tokens_per_second"), guess.get("estimate_peak_gib")
        if record["status"] != "ok" or rate is None or memory is None:
            continue
        measured, peak = record["tokens_per_second"], record["peak_allocated_gib"]
        row = [f"{rate:,.0f}", f"{measured:,.0f}", f"{measured / rate:.2f}", f"{memory:.1f}", f"{peak:.1f}"]
        rows.append([f"{cell.label}, {cell.ranks} x {record['device_name']}, {cell.layers} layers", *row])
    header = ["measured before", "estimate", "tokens/s per GPU", "of estimate", "GiB, estimate", "GiB"]
    return "\n".join(markdown.lines(header, rows)) if rows else "Nothing was measured yet."
