"""The commands: what they run, record and resume, and their tables. Stand-ins measure, but for one run as it is."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import records, train
from benchmarks.cells import Cell

H200 = "NVIDIA H200"
_ONE_RANK = "--device cpu --ranks 1 --sizes tiny --layers 1 --tokens 1x64 --steps 2 --warmup 1".split()  # noqa: SIM905


class Stand:
    """Stands in for the processes of cells; measured rates are 100, 200, ... in the order of their runs."""

    def __init__(self, out_of_memory: str = "", hangs_at: int | None = None) -> None:
        self.labels: list[str] = []
        self._out_of_memory, self._hangs_at = out_of_memory, hangs_at

    def __call__(self, cell: Cell, timeout: float, folder: Path) -> dict[str, Any]:
        self.labels.append(cell.label)
        record: dict[str, Any] = {"cell": dataclasses.asdict(cell), "device_name": "CPU", "date": "2026-01-01"}
        record |= {"seconds": 1.0, "command": "python -m benchmarks.train --some"}
        record |= {"machine": {"device_name": "CPU", "versions": {"torch": "2"}}}
        record["commit"] = "aaa" if cell.tree else "bbb"
        if len(self.labels) == self._hangs_at:
            return {**record, "status": "timed out", "error": "rank 0 still ran"}
        if cell.label == self._out_of_memory:
            return {**record, "status": "out of memory", "error": "OutOfMemoryError: CUDA out of memory"}
        rate = 100.0 * len(self.labels)
        rates = dict.fromkeys(("tokens_per_second", "tokens_per_second_p10", "tokens_per_second_p90"), rate)
        steps = {"steps_ms": [cell.tokens / rate * 1e3], "step_ms": 1.0, "first_loss": 5.0, "last_loss": 4.0}
        return {**record, "status": "ok", **rates, **steps}


def _tiny(trainer: str, batch: int = 2, **settings: Any) -> Cell:
    return Cell(trainer, batch, 16, 2, "tiny", 1, steps=2, warmup=1, device="cpu", **settings)


# ---------------------------------------------------------------------- runs


@pytest.mark.slow
def test_train_measures_a_cell_from_the_command_line_to_the_table(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    command = [sys.executable, "-m", "benchmarks.train", "--json", str(path), *_ONE_RANK]
    done = subprocess.run(
        [*command, "--trainers", "lightning_ep/ep=1"], cwd=records.ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    (record,) = records.read(path)
    assert (record["status"], record["cell"]["trainer"]) == ("ok", "lightning_ep/ep=1")
    assert record["commit"] == records.commit()
    assert "| lightning_ep/ep=1 | 1x64 |" in done.stdout
    assert f"commit {record['commit']}" in path.with_suffix(".md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_train_compares_with_another_tree_in_turns(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    shutil.copytree(records.ROOT / "lightning_ep", old / "lightning_ep")
    (old / ".commit").write_text("abc1234")
    command = [sys.executable, "-m", "benchmarks.train", "--json", str(tmp_path / "r.jsonl"), *_ONE_RANK]
    command += ["--trainers", "lightning_ep/ep=1", "--against", str(old)]
    done = subprocess.run(command, cwd=records.ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = records.read(tmp_path / "r.jsonl")
    assert [record["commit"] for record in found] == ["abc1234", records.commit(), records.commit(), "abc1234"]
    assert "old is abc1234, new is" in done.stdout
    assert "| lightning_ep/ep=1 | 1x64 |" in done.stdout


def test_against_needs_a_tree(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no lightning_ep: unpack a commit there with git archive"):
        train.main(["--device", "cpu", "--against", str(tmp_path)])


def test_recorded_cells_are_skipped(tmp_path: Path) -> None:
    path, stand = tmp_path / "new" / "records.jsonl", Stand()
    cells = [_tiny("lightning_ep/ep=2"), _tiny("transformers/fsdp2"), _tiny("transformers/ep")]
    assert train.run(cells[:2], path, 60, 600, measure=stand) == 0
    assert train.run(cells, path, 60, 600, measure=stand) == 0
    assert stand.labels == [cell.label for cell in cells]
    assert [record["cell"]["trainer"] for record in records.read(path)] == [cell.trainer for cell in cells]
    assert "| transformers/ep |" in path.with_suffix(".md").read_text()


def test_a_cut_command_goes_on_and_past_a_cell_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, path = train.run, tmp_path / "r.jsonl"
    trainers = ["lightning_ep/ep=2+full", "transformers/fsdp2+full", "lightning_ep/ep=2"]
    labels = [f"{trainer} {shape}" for shape in ("4x16", "1x16") for trainer in trainers]

    def call(stand: Stand, *arguments: str) -> object:
        monkeypatch.setattr(train, "run", lambda *args: run(*args, measure=stand))
        monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: 60.0 * len(stand.labels)))
        options = ["--ranks", "2", "--device", "cpu", "--sizes", "tiny", "--json", str(path), *arguments]
        with pytest.raises(SystemExit) as end:
            train.main([*options, "--tokens", "4x16", "1x16", "--trainers", *trainers])
        return end.value.code

    # The fifth cell would have 10 s, less than a third of its time.
    first = Stand(out_of_memory=labels[1])
    assert call(first, "--timeout", "60", "--budget", "250") == 3
    assert first.labels == labels[:4]
    assert "4 of 6 cells are done and the budget is; the same command goes on" in capsys.readouterr().out
    # It has 30 s, which cut it short.
    cut = Stand(hangs_at=1)
    assert call(cut, "--timeout", "60", "--budget", "30") == 3
    assert "the same command repeats it" in capsys.readouterr().out
    assert len(records.read(path)) == 4
    second = Stand()
    assert call(second) == 0
    assert second.labels == labels[4:]
    text = path.with_suffix(".md").read_text()
    assert "- transformers/fsdp2+full 4x16: out of memory: `OutOfMemoryError" in text
    assert text.count("| lightning_ep/") == sum(label.startswith("lightning_ep") for label in labels)


def test_a_cell_that_ends_by_its_own_time_out_is_recorded(tmp_path: Path) -> None:
    cells = [_tiny("lightning_ep/ep=2"), _tiny("lightning_ep/ep=1")]
    assert train.run(cells, tmp_path / "r.jsonl", 60, 600, measure=Stand(hangs_at=1)) == 0
    assert [record["status"] for record in records.read(tmp_path / "r.jsonl")] == ["timed out", "ok"]


def test_an_interrupted_command_still_writes_its_table(tmp_path: Path) -> None:
    measured = Stand()

    def interrupted(cell: Cell, timeout: float, folder: Path) -> dict[str, Any]:
        if measured.labels:
            raise KeyboardInterrupt
        return measured(cell, timeout, folder)

    cells = [_tiny("lightning_ep/ep=2"), _tiny("lightning_ep/ep=1")]
    with pytest.raises(KeyboardInterrupt):
        train.run(cells, tmp_path / "r.jsonl", 60, 600, measure=interrupted)
    assert "| lightning_ep/ep=2 | 2x16 | 100" in (tmp_path / "r.md").read_text()


# ---------------------------------------------------------------------- tables


def _records(cells: list[Cell]) -> list[dict[str, Any]]:
    stand = Stand()
    return [stand(cell, 1, Path()) for cell in cells]


def test_table_compares_with_the_best_peer_of_the_same_shape() -> None:
    trainers = ("transformers/fsdp2", "transformers/ep", "lightning_ep/ep=2")
    cells = [*map(_tiny, trainers), _tiny("transformers/ep", batch=4)]
    text = "\n".join([*records.overview(_records(cells)), records.runs(_records(cells))])
    assert "| lightning_ep/ep=2 | 2x16 | 300 (300 to 300) | 1.50 |" in text
    assert "| transformers/fsdp2 | 2x16 | 100 (100 to 100) | 0.50 |" in text
    assert "| transformers/ep | 4x16 | 400 (400 to 400) | 1.00 |" in text
    assert "2026-01-01, commit bbb, CPU, torch 2: `python -m benchmarks.train --some`" in text


def test_recompute_is_compared_with_as_much_recompute() -> None:
    trainers = ("transformers/fsdp2", "transformers/ep+full", "lightning_ep/ep=2", "lightning_ep/ep=2+full")
    found = _records([_tiny(trainer) for trainer in trainers])
    assert [records.best_peer(record, found) for record in found[2:]] == [100, 200]
    assert [records.best_peer(record, found[1:]) for record in found[2:]] == [None, 200]


def test_table_has_estimate_and_measurement_side_by_side() -> None:
    record = _records([_tiny("lightning_ep/ep=2", memory_cap_gib=76.0)])[0]
    record |= {"estimate_tokens_per_second": 80.0, "estimate_peak_gib": 60.0}
    record |= {"peak_allocated_gib": 66.25, "peak_reserved_gib": 70.0, "mfu": 0.4}
    lines = records.overview([record])[0].splitlines()
    assert lines[2].startswith(
        "| trainer | per GPU | tokens/s per GPU | of estimate | MFU | peak GiB (reserved) | GiB, e"
    )
    assert lines[4].startswith(
        "| lightning_ep/ep=2 | 2x16, 76 GiB | 100 (100 to 100) | 1.25 | 40.0% | 66.2 (70.0) | 60.0"
    )


def test_table_tells_steps_that_a_monitor_looks_at() -> None:
    found = _records([_tiny("lightning_ep/ep=2", monitor=3), _tiny("lightning_ep/ep=2")])
    for record in found:  # the warm-up has one step: these are the second to the seventh
        record |= {"steps_ms": [1.0, 2.0, 1.0, 1.0, 4.0, 1.0]}
    first, second = records.overview(found)[0].splitlines()[4:]
    assert first.endswith("| 1.0 | 3.0 | 5.00 to 4.00 |")
    assert second.endswith("| 1.0 |  | 5.00 to 4.00 |")


def test_table_shows_kernels_by_kind() -> None:
    first, second = _records([_tiny("lightning_ep/ep=2"), _tiny("transformers/ep")])
    first |= {"by_kind": {"attention": 4.0, "grouped GEMM": 3.0}, "launches": 7}
    second |= {"by_kind": {"grouped GEMM": 5.0}, "launches": 9}
    text = "\n".join(records.overview([first, second]))
    assert "| GPU ms of a step by kind of kernel (rank 0) | per GPU | attention | grouped GEMM | launches |" in text
    assert "| lightning_ep/ep=2 | 2x16 | 4.0 | 3.0 | 7 |" in text
    assert "| transformers/ep | 2x16 | 0.0 | 5.0 | 9 |" in text


def test_comparison_pairs_turns_and_tells_what_failed() -> None:
    cells = [turn for batch in (2, 4) for turn in _tiny("lightning_ep/ep=2", batch=batch).in_turns("/old")]
    found = _records(cells)  # old 100, new 200, new 300, old 400; and so on
    text = "\n".join(records.comparison(found))
    assert "**old is aaa, new is bbb; medians" in text
    # Medians of steps of both turns: 1 / (mean of 1/100 and 1/400), 1 / (mean of 1/200 and 1/300).
    assert "| lightning_ep/ep=2 | 2x16 | 160 (108 to 308) | 240 (207 to 286) | 1.500 | 2.000, 0.750 |" in text
    found[5] = {**found[5], "status": "failed", "error": "why"}
    text = "\n".join(records.comparison(found))
    assert "| 4x16 |" not in text
    assert "- lightning_ep/ep=2 4x16, turn 1 with this tree: failed: `why`" in text


# ---------------------------------------------------------------------- records


def test_a_record_says_which_commit_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert records.commit(tmp_path) == "unknown"
    (tmp_path / ".commit").write_text("abc1234\n")
    assert records.commit(tmp_path) == "abc1234"
    monkeypatch.setenv("LIGHTNING_EP_COMMIT", "def5678")
    assert records.commit(tmp_path) == "abc1234", "the variable is about this tree"
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert records.commit(tmp_path) == "def5678"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], check=True)
    name = subprocess.run([*git, "log", "-1", "--format=%h"], check=True, capture_output=True, text=True).stdout.strip()
    assert records.commit(tmp_path) == "def5678", "it was copied, with somebody's .git"
    monkeypatch.delenv("LIGHTNING_EP_COMMIT")
    assert records.commit(tmp_path) == name
    (tmp_path / "more").write_text("")
    assert records.commit(tmp_path) == f"{name}+changes"


def test_a_run_that_is_cut_has_kept_its_rows_once(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    other = {"title": "other", "date": "2026-01-01", "rows": [{"stage": "save", "s": "1"}]}
    run = {"title": "this", "date": "2026-01-02"}
    records.publish(path, other)
    records.publish(path, {**run, "rows": [{"stage": "save", "s": "2"}]})
    page = records.publish(path, {**run, "rows": [{"stage": "save", "s": "2"}, {"stage": "load", "s": "3"}]})
    assert [(record["title"], len(record["rows"])) for record in records.read(path)] == [("other", 1), ("this", 2)]
    assert page.count("| save | 2 |") == page.count("| load | 3 |") == 1
    assert path.with_suffix(".md").read_text() == page + "\n"


def test_records_from_before_a_field_was_there_are_found(tmp_path: Path) -> None:
    cell = _tiny("lightning_ep/ep=1")
    old = {name: value for name, value in dataclasses.asdict(cell).items() if name not in ("tree", "turn")}
    records.append(tmp_path / "r.jsonl", {"cell": old, "device_name": "CPU", "number": 1})
    records.append(tmp_path / "r.jsonl", {"cell": old, "device_name": H200, "number": 2})
    found = records.find(tmp_path / "r.jsonl", cell, "CPU")
    assert found is not None
    assert found["number"] == 1
    assert records.find(tmp_path / "r.jsonl", _tiny("lightning_ep/ep=2"), "CPU") is None
