"""The benchmark of one node: its named cells, what is estimated of them, and the command that runs them all."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import costs, node, train, weights
from benchmarks.cells import SIZES, Cell
from benchmarks.estimates import estimates, limit_gib, peak_gib
from benchmarks.launch import run_cell
from benchmarks.matrix import MARKS, node_matrix
from benchmarks.node_report import matrix_table, model_table, node_section
from benchmarks.records import key, latest, read

QWEN, H200 = SIZES["qwen3-30b-a3b"], "NVIDIA H200"


def _ours(trainer: str, shape: tuple[int, int] = (4, 4096), ranks: int = 8, **settings: Any) -> Cell:
    return Cell(f"lightning_ep/{trainer}+compile", *shape, ranks, **{"layers": 48, **settings})


# ---------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_matrix_has_at_most_16_cells_that_differ(ranks: int) -> None:
    for device, sizes in (("cuda", "qwen3-30b-a3b"), ("cpu", "tiny")):
        matrix = node_matrix(ranks, 12, sizes, device)
        assert 11 <= len(matrix) <= 16
        assert len(set(matrix.values())) == len(matrix) == len({cell.label for cell in matrix.values()})
        assert all((cell.ranks, cell.layers, cell.device) == (ranks, 12, device) for cell in matrix.values())
        assert all(ranks % cell.ep == 0 for cell in matrix.values())


def test_matrix_of_eight_gpus_is_what_was_asked_for() -> None:
    cells = {(cell.trainer.removesuffix("+compile"), cell.shape) for cell in node_matrix().values()}
    ours = [f"lightning_ep/ep={ep}{recompute}" for ep in (8, 1) for recompute in ("", "+full")]
    others = ["lightning_ep/ep=2", "lightning_ep/ep=4", "transformers/fsdp2+full", "transformers/ep+full"]
    assert {(trainer, "4x4096") for trainer in [*ours, *others]} <= cells
    assert {("lightning_ep/ep=8", "1x4096"), ("lightning_ep/ep=8", "1x16384")} <= cells
    assert ("lightning_ep/ep=8+full", "1x32768") in cells
    cells = list(node_matrix().values())
    assert [cell.ep for cell in cells if cell.router == "skewed"] == [8]
    assert [cell.memory_cap_gib for cell in cells if cell.memory_cap_gib] == [76.0]
    assert [cell.task for cell in cells if cell.task != "train"] == ["weights"]


def test_every_cell_of_ours_has_estimates_and_none_is_hopeless() -> None:
    for cell in node_matrix().values():
        guess, limit = estimates(cell, H200), limit_gib(cell, H200)
        assert limit is not None
        if cell.ours:
            assert all(value is not None and value > 0 for value in guess.values())
            assert (guess.get("estimate_peak_gib") or 0.0) < limit
        else:
            assert set(guess.values()) == {None}


# ---------------------------------------------------------------------- estimates


@pytest.mark.parametrize(
    ("trainer", "shape", "rate", "gib"),  # measured on one H200, 6 layers (docs/performance.md)
    [
        ("ep=1", (4, 4096), 89_847, 75.2),
        ("ep=1+selective", (4, 4096), 83_596, 71.9),
        ("ep=1+full", (4, 4096), 79_502, 69.3),
        ("ep=1", (1, 4_096), 49_970, 70.2),
        ("ep=1", (1, 16_384), 66_954, 75.2),
        ("ep=1+full", (1, 32_768), 45_070, 70.1),
    ],
)
def test_estimates_are_close_to_what_one_gpu_measured(
    trainer: str, shape: tuple[int, int], rate: float, gib: float
) -> None:
    cell = _ours(trainer, shape, 1, layers=6)
    estimate = costs.estimate_tokens_per_second(cell, H200)
    assert estimate is not None
    assert 0.95 < rate / estimate < 1.15
    assert peak_gib(cell, H200) == pytest.approx(gib, abs=0.2)


def test_rows_go_to_every_other_rank_that_holds_an_expert_of_the_token() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(20_000, 128, generator=generator).topk(8).indices
    for ep in (2, 4, 8, 16):
        owners = torch.nn.functional.one_hot(chosen // (128 // ep), ep).amax(1)
        assert costs.rows_sent(QWEN, ep) == pytest.approx(owners[:, 1:].sum(1).double().mean().item(), rel=0.01)


def test_time_of_recompute_and_of_sharded_experts() -> None:
    def parts(trainer: str, **settings: Any) -> dict[str, float]:
        found = costs.estimate_ms(_ours(trainer, **settings), H200)
        assert found is not None
        return found

    # A third of projections and norms, 2 of 7 products of the core; the up projection is 2 of 9 GEMMs of the experts.
    selective = 48 * (2.9 / 3 + 4.0 * 2 / 7 + 1.0 / 3)
    assert parts("ep=8+selective")["recompute"] == pytest.approx(selective)
    full = selective + 48 * (6.0 * 2 / 9 + 1.7 / 8)
    assert parts("ep=1+full")["recompute"] == pytest.approx(full)
    hop = parts("ep=8")["dispatch and combine"] / 4
    assert parts("ep=8+full")["recompute"] == pytest.approx(full + hop)
    assert hop / 48 == pytest.approx(0.2 * costs.rows_sent(QWEN, 8) / costs.rows_sent(QWEN, 2))
    # At 16k tokens arithmetic hides the gathers: copies remain, 48 bytes for each of 604 M parameters at 4.8 TB/s.
    copies = 48 * 48 * 128 * 3 * 2048 * 768 / 4.8e9
    assert parts("ep=1")["FSDP of experts"] == pytest.approx(copies)
    assert parts("ep=1", shape=(1, 4096))["FSDP of experts"] > 1.5 * copies
    assert parts("ep=8")["FSDP of experts"] == 0


def test_memory_scales_with_layout_and_recompute() -> None:
    gib = 2**30
    by_mode = {mode: peak_gib(_ours(f"ep=8{mode}"), H200) for mode in ("", "+selective", "+full")}
    experts = 48 * costs.expert_parameters(QWEN) / gib
    others = costs.num_parameters(QWEN, 48) / gib - experts
    state = 16 * (experts + others) / 8  # gradients of experts in bf16, and bf16 copies of their weights
    rows = 8 * (1 - math.comb(112, 8) / math.comb(128, 8))  # of 4 KiB, and 24 KiB of pairs
    assert by_mode["+selective"] - by_mode["+full"] == pytest.approx(48 * 16_384 * (4 * rows + 24) * 1024 / gib)
    assert state < by_mode["+full"] < 76 < by_mode["+selective"] < by_mode[""] < limit_gib(_ours("ep=8"), H200)
    # Where copies do not fit any more: 14 bytes.
    larger = (14 * experts + 16 * others) / 4
    assert peak_gib(_ours("ep=4+full", ranks=4), H200) - by_mode["+full"] == pytest.approx(larger - state, rel=0.02)
    assert peak_gib(_ours("ep=8+selective", (1, 32_768)), H200) > 0.98 * limit_gib(_ours("ep=8"), H200)
    assert limit_gib(_ours("ep=8", memory_cap_gib=76.0), H200) == 76


def test_a_short_step_waits_for_the_host() -> None:
    cell = _ours("ep=8", (1, 4096))
    host = costs.host_ms(cell)
    parts = costs.estimate_ms(cell, H200)
    assert host is not None
    assert parts is not None
    assert sum(parts.values()) < host
    # Counts of rows come when the GPU has finished the optimizer step before.
    waits = parts["AdamW"] + parts["norm"]
    assert costs.estimate_tokens_per_second(cell, H200) == pytest.approx(4096 / (host + waits) * 1e3)
    assert costs.estimate_tokens_per_second(cell.rehearsal, H200) == pytest.approx(11_589, rel=0.06)
    pair = dataclasses.replace(_ours("ep=2", (1, 4096)), ranks=2, layers=12)
    assert costs.estimate_tokens_per_second(pair, H200) == pytest.approx(25_708, rel=0.02)  # measured


# ---------------------------------------------------------------------- weights


def test_weights_are_saved_and_loaded() -> None:
    cell = Cell("lightning_ep/ep=2", 1, 16, 2, sizes="tiny", layers=1, device="cpu", task="weights")
    record = run_cell(cell, timeout=60)
    assert record["status"] == "ok", record
    assert record["save_s"] > 0
    assert record["load_s"] > 0
    expected = 2 * costs.num_parameters(SIZES["tiny"], 1)
    assert expected < record["gb"] * 1e9 < expected + 20_000  # headers
    with pytest.raises(ValueError, match="task='weights' of transformers/fsdp2 does not exist"):
        Cell("transformers/fsdp2", 1, 16, 2, task="weights")


def test_weights_that_come_back_different_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    before, after = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    after.load_state_dict(before.state_dict())
    weights._compare(before, after)
    with torch.no_grad():
        after.bias[3] += 1
    with pytest.raises(RuntimeError, match="rank 1: bias was not loaded"):
        weights._compare(before, after)


# ---------------------------------------------------------------------- the command


class _Processes:
    """Stands in for the processes of cells; measured rates are 100, 200, ... in the order of their runs."""

    def __init__(self, out_of_memory: str = "", hangs_at: int | None = None) -> None:
        self.labels: list[str] = []
        self._out_of_memory, self._hangs_at = out_of_memory, hangs_at

    def __call__(self, cell: Cell, timeout: float, folder: Path | None) -> dict[str, Any]:
        self.labels.append(cell.label)
        record: dict[str, Any] = {"cell": dataclasses.asdict(cell), "device_name": "CPU", "date": "2026-01-01"}
        record |= {"seconds": 1.0, "machine": {"device_name": "CPU", "versions": {"torch": "2"}}}
        if len(self.labels) == self._hangs_at:
            return {**record, "status": "timed out", "error": "rank 0 still ran"}
        if cell.label == self._out_of_memory:
            return {**record, "status": "out of memory", "error": "OutOfMemoryError: CUDA out of memory"}
        if cell.task == "weights":
            return {**record, "status": "ok", "save_s": 4.0, "load_s": 2.0, "gb": 8.0}
        rate = 100.0 * len(self.labels)
        rates = dict.fromkeys(("tokens_per_second", "tokens_per_second_p10", "tokens_per_second_p90"), rate)
        return {**record, "status": "ok", **rates, "step_ms": 1.0, "first_loss": 5.0, "last_loss": 4.0}


def _call(path: Path, processes: _Processes, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command on two ranks of CPUs with stand-ins for its processes; its exit status."""

    def run(*args: Any, **kwargs: Any) -> bool:
        return train.run(*args, **kwargs, measure=processes)

    monkeypatch.setattr(node, "run", run)
    options = ["--ranks", "2", "--device", "cpu", "--sizes", "tiny", "--json", str(path), *arguments]
    with pytest.raises(SystemExit) as end:
        node.main(options)
    return int(str(end.value.code))


def test_command_resumes_after_a_cut_and_goes_past_a_cell_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, labels = tmp_path / "node.jsonl", [cell.label for cell in node_matrix(2, 48, "tiny", "cpu").values()]
    first = _Processes(out_of_memory=labels[1], hangs_at=5)
    # The budget is less than the cell's time-out: it is what cuts the fifth cell short.
    assert _call(path, first, monkeypatch, "--budget", "100") == 3
    assert first.labels == labels[:5]
    text = path.with_suffix(".md").read_text()
    assert "| transformers FSDP2, full recompute | transformers/fsdp2+full | 4x16 | - | out of memory |" in text
    assert "| ep=1, full recompute | lightning_ep/ep=1+full | 4x16 | - | not run yet |" in text
    second = _Processes()
    assert _call(path, second, monkeypatch) == 0
    assert second.labels == labels[4:]
    assert "not run yet" not in path.with_suffix(".md").read_text()
    assert "| weights | - | save 4 s, load 2 s |" in path.with_suffix(".md").read_text()
    third = _Processes()
    assert _call(path, third, monkeypatch, "--retry-failed") == 0
    assert third.labels == [labels[1]]
    assert len(latest(read(path))) == len(labels)


def test_one_gpu_rehearses_what_needs_no_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, processes = tmp_path / "node.jsonl", _Processes()
    assert _call(path, processes, monkeypatch, "--rehearse") == 0
    cells = [Cell(**record["cell"]) for record in read(path)]
    matrix = node_matrix(2, 48, "tiny", "cpu").values()
    assert [dataclasses.replace(cell, rehearse=False) for cell in cells] == [c for c in matrix if c.can_rehearse]
    assert all(cell.processes == 1 for cell in cells)
    assert "| rehearsed |" in path.with_suffix(".md").read_text()
    assert _call(path, _Processes(), monkeypatch, "--budget", "500") == 0
    text = path.with_suffix(".md").read_text()
    assert "| rehearsed |" in text, "the table of a run forgets the rehearsal"
    assert "not run yet" not in text
    with pytest.raises(SystemExit, match="--ranks 8"):
        node.main(["--rehearse", "--device", "cpu"])


def test_a_cell_that_ends_by_its_own_time_out_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = _Processes(hangs_at=1)
    assert _call(tmp_path / "node.jsonl", processes, monkeypatch, "--budget", "540") == 0
    assert [record["status"] for record in read(tmp_path / "node.jsonl")][:2] == ["timed out", "ok"]


def test_an_interrupted_command_still_writes_its_table(tmp_path: Path) -> None:
    cells = list(node_matrix(2, 1, "tiny", "cpu").values())[:2]
    measured = _Processes()

    def interrupted(cell: Cell, timeout: float, folder: Path | None) -> dict[str, Any]:
        if measured.labels:
            raise KeyboardInterrupt
        return measured(cell, timeout, folder)

    with pytest.raises(KeyboardInterrupt):
        train.run(dict.fromkeys(cells, 60), tmp_path / "r.jsonl", 600, measure=interrupted)
    assert "| lightning_ep/ep=2+full | 100" in (tmp_path / "r.md").read_text()


# ---------------------------------------------------------------------- tables


def test_table_has_estimate_and_measurement_side_by_side_and_marks_apart() -> None:
    matrix = node_matrix()
    names = list(matrix)
    records = []
    for name, rate in ((names[0], 12_000.0), (names[1], 6_000.0), ("transformers FSDP2, 1 x 4096", 9_000.0)):
        cell = dataclasses.asdict(matrix[name])
        guess = {"estimate_tokens_per_second": 10_000.0 if matrix[name].ours else None, "estimate_peak_gib": None}
        rates = {"tokens_per_second": rate, "peak_allocated_gib": 70.0}
        records.append({"cell": cell, "device_name": H200, "status": "ok", **rates, **guess})
    lines = matrix_table(matrix, records, H200).splitlines()
    # The estimate is the one written before the run, and the peer that of the same shape.
    assert f"| {names[0]} | {matrix[names[0]].trainer} | 4x4096 | 10,000 | 12,000 | 1.20 | 2.00 | - | 70.0 |" in lines
    assert sum("not run yet" in line for line in lines) == 13
    assert sum("NeMo Automodel" in line for line in lines) == 1
    assert not any(mark.who in line for mark in MARKS for line in lines[: lines.index("")])


def test_rehearsals_stand_beside_the_estimates() -> None:
    matrix = node_matrix()
    names = ["ep=8, full recompute", "transformers FSDP2, full recompute", "ep=8"]
    records = []
    for name, rate in zip(names, (15_000.0, 12_000.0, None), strict=True):
        cell = dataclasses.asdict(dataclasses.replace(matrix[name], rehearse=True))
        rates = {} if rate is None else {"tokens_per_second": rate, "peak_allocated_gib": 65.04}
        status = "out of memory" if rate is None else "ok"
        records.append({"cell": cell, "device_name": H200, "status": status, **rates})
    lines = [line for line in matrix_table(matrix, records, H200).splitlines() if line.startswith("| ")]
    columns = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[3:7] for line in lines}
    assert columns[names[0]][1:] == ["15,000 (1.25)", "65.0", "not run yet"]
    assert columns[names[1]] == ["-", "12,000", "65.0", "not run yet"]
    assert columns[names[2]][1:] == ["out of memory", "", "not run yet"]
    assert columns["weights saved and loaded, ep=8"][1:] == ["", "", "not run yet"]


def test_section_shows_the_full_matrix_and_that_of_every_run() -> None:
    cell = node_matrix(1, 6)["ep=1"]
    record = {"cell": vars(cell), "device_name": H200, "status": "ok", "tokens_per_second": 75_000.0}
    record |= {"peak_allocated_gib": 75.2}
    text = node_section([record], [record])
    assert "**8 x NVIDIA H200, 48 layers**" in text
    assert "**1 x NVIDIA H200, 6 layers**" in text
    assert "| 75,000 | 0.87 |" in model_table([record])
    assert "Nothing was measured yet" in node_section([], [])


def test_records_from_before_a_field_was_there_are_found() -> None:
    cell = dataclasses.asdict(node_matrix()["ep=1"])
    old = {name: value for name, value in cell.items() if name != "task"}
    assert key(old, H200) == key(cell, H200)
