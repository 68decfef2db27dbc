"""Cells in processes of their own: what they measure, and what is recorded where they cannot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure
from benchmarks.cells import SIZES, Cell
from benchmarks.train import estimates, mfu, run_cell

H200 = "NVIDIA H200"


def _tiny(trainer: str, ranks: int = 2, **overrides: Any) -> Cell:
    settings: dict[str, Any] = {"sizes": "tiny", "layers": 1, "steps": 2, "warmup": 1, "device": "cpu", **overrides}
    return Cell(trainer, 2, 16, ranks, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "ranks"),
    [
        ("lightning_ep/ep=2+full", 2),
        ("lightning_ep/ep=1,cp=2", 2),
        ("lightning_ep/ep=2,tp=2", 2),
        ("transformers/ep+full", 2),
        ("transformers/fsdp2", 1),
        ("transformers/peft+full", 1),
    ],
)
def test_a_cell_measures(trainer: str, ranks: int, tmp_path: Path) -> None:
    record = run_cell(_tiny(trainer, ranks, lora="all,2" if "peft" in trainer else None), 60, tmp_path)
    assert record["status"] == "ok", record
    assert record["tokens_per_second_p10"] <= record["tokens_per_second"] <= record["tokens_per_second_p90"]
    assert record["first_loss"] == pytest.approx(math.log(SIZES["tiny"]["vocab_size"]), abs=0.1)
    assert record["launch_ms"] > 0
    assert 1 < record["max_over_mean_tokens_per_expert"] <= 2  # eight experts, top-4
    assert record["device_name"] == "CPU"
    assert json.loads(json.dumps(record)) == record


@pytest.mark.slow
def test_a_cell_with_a_monitor_measures_and_is_looked_at(tmp_path: Path) -> None:
    record = run_cell(_tiny("lightning_ep/ep=2", monitor=1), 90, tmp_path)
    assert record["status"] == "ok", record
    assert (tmp_path / "routing" / "load_curves.png").exists()


@pytest.mark.slow
def test_a_step_of_micro_batches_without_exchanges_measures(tmp_path: Path) -> None:
    record = run_cell(_tiny("lightning_ep/ep=2", accumulate=2, exchange="none"), 90, tmp_path)
    assert record["status"] == "ok", record
    assert record["tokens_per_second"] == pytest.approx(2 * 2 * 16 / record["step_ms"] * 1e3)
    assert record["last_loss"] == pytest.approx(record["first_loss"], abs=0.2)


def test_the_code_that_runs_is_that_of_the_tree(tmp_path: Path) -> None:
    package = tmp_path / "old" / "lightning_ep"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemError('the old tree')")
    (package.parent / ".commit").write_text("abc1234\n")
    record = run_cell(_tiny("lightning_ep/ep=1", 1, tree=str(package.parent)), 60, tmp_path / "logs")
    assert (record["status"], record["error"]) == ("failed", "SystemError: the old tree")
    assert record["commit"] == "abc1234"


def test_code_of_another_tree_than_the_cell_s_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import ours

    with pytest.raises(RuntimeError, match=f"lightning_ep is that of .*, not of {tmp_path}"):
        ours.run(_tiny("lightning_ep/ep=1", 1, tree=str(tmp_path)), None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_cell_that_raises_is_recorded_with_its_error(tmp_path: Path) -> None:
    record = run_cell(_tiny("lightning_ep/ep=3", 1), 60, tmp_path)
    assert record["status"] == "failed"
    assert record["error"].startswith("ValueError: replicate=1 times fsdp=1 times ep=3")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory"),
        (torch.distributed.DistBackendError("NCCL error: ncclUnhandledCudaError: 'out of memory'"), "out of memory"),
        (RuntimeError("shape mismatch"), "failed"),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, expected: str) -> None:
    assert measure.status(error) == expected
    assert measure.one_line(RuntimeError("two\n lines")) == "RuntimeError: two lines"


def test_a_cell_that_hangs_is_ended_and_recorded(tmp_path: Path) -> None:
    record = run_cell(_tiny("transformers/fsdp2", 1), 0.5, tmp_path)
    assert record["status"] == "timed out"
    assert record["seconds"] < 10


@pytest.mark.parametrize(("rate", "expected"), [(47_800, 0.347), (29_086, 0.211), (32_162, 0.233), (24_228, 0.176)])
def test_mfu_is_that_of_the_design_for_its_measured_rates(rate: float, expected: float) -> None:
    cell = Cell("transformers/fsdp2", 4, 4096, 2)
    assert mfu(cell, rate, H200) == pytest.approx(expected, abs=6e-4)
    assert mfu(cell, rate, "some other card") is None


@pytest.mark.parametrize("trainer", ["ep=8+full", "ep=8", "ep=1", "ep=4"])
def test_cells_of_a_node_have_estimates_and_none_is_hopeless(trainer: str) -> None:
    cell = Cell(f"lightning_ep/{trainer}+compile", 4, 4096, 8, layers=48)
    guess = estimates(cell, H200)
    assert guess["estimate_tokens_per_second"] > 0
    assert guess["estimate_peak_gib"] < 135
    assert estimates(Cell("transformers/fsdp2+full", 4, 4096, 8, layers=48), H200) == {}


def test_what_takes_more_micro_batches_or_adapters_is_estimated_too() -> None:
    plain, more = (Cell("lightning_ep/ep=2", 4, 4096, 2, layers=12, accumulate=n) for n in (1, 8))
    rates = [estimates(cell, H200)["estimate_tokens_per_second"] for cell in (plain, more)]
    assert rates[0] < rates[1]
    adapters = [Cell("lightning_ep/ep=2+full", 4, 4096, 2, layers=48, lora=lora) for lora in ("attention,8", "all,8")]
    assert len({estimates(cell, H200)["estimate_peak_gib"] for cell in adapters}) == 2


def test_nothing_is_estimated_of_what_the_planner_does_not_know() -> None:
    for cell in (
        Cell("lightning_ep/ep=3", 4, 4096, 2),
        Cell("torchtitan/ep", 4, 4096, 2),
        Cell("lightning_ep/ep=2", 4, 4096, 2, data="chats"),
        Cell("lightning_ep/ep=2", 4, 4096, 2, exchange="none"),
    ):
        assert estimates(cell, H200) == {}
    assert estimates(Cell("lightning_ep/ep=2", 4, 4096, 2), "CPU") == {}
