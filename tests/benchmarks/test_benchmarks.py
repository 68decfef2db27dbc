"""The benchmark command: its arithmetic against numbers made by hand, and whole cells on the CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import costs, loss, moe_layer, report, router, trace, worker
from benchmarks import train as command
from benchmarks.cells import SIZES, Cell, default_trainers, parse_shape
from benchmarks.launch import run_cell
from benchmarks.measure import Meter, fill_parameters, merge, quantile
from benchmarks.records import append, read

QWEN = SIZES["qwen3-30b-a3b"]


def _tiny(trainer: str, ranks: int = 2, **overrides: Any) -> Cell:
    settings: dict[str, Any] = {"sizes": "tiny", "layers": 1, "steps": 2, "warmup": 1, "device": "cpu", **overrides}
    return Cell(trainer, 2, 16, ranks, **settings)


# ---------------------------------------------------------------------- arithmetic


def test_flops_count_causal_attention_and_active_experts() -> None:
    # By hand for one layer of Qwen3-30B-A3B at 4,096 tokens, forward, in multiply-adds per token:
    projections = 2048 * 4096 + 2 * 2048 * 512 + 4096 * 2048  # q; k and v; o
    core = 2 * 4096 * 2048.5  # scores and values, 32 heads of 128, half of the 4,097 positions
    experts = 8 * (2048 * 768 + 2048 * 768 + 768 * 2048)
    assert costs.flops_per_token(QWEN, 1, 4096) - costs.flops_per_token(QWEN, 0, 4096) == pytest.approx(
        3 * 2 * (projections + core + 2048 * 128 + experts)
    )
    assert costs.flops_per_token(QWEN, 0, 4096) == 3 * 2 * 2048 * 151_936


@pytest.mark.parametrize(("rate", "expected"), [(47_800, 0.347), (29_086, 0.211), (32_162, 0.233), (24_228, 0.176)])
def test_mfu_is_that_of_the_design_for_its_measured_rates(rate: float, expected: float) -> None:
    cell = Cell("lightning_ep/ep=2", 4, 4096, 2)
    assert costs.mfu(cell, rate, "NVIDIA H200") == pytest.approx(expected, abs=6e-4)
    assert costs.mfu(cell, rate, "some other card") is None


def test_parameters_are_those_of_a_model() -> None:
    with torch.device("meta"):
        from transformers.models.qwen3_moe import Qwen3MoeForCausalLM

        model = Qwen3MoeForCausalLM(_tiny("lightning_ep/ep=1").config())
    assert costs.num_parameters(SIZES["tiny"], 1) == sum(p.numel() for p in model.parameters())


def test_estimate_is_the_design_s_budget() -> None:
    parts = costs.estimate_ms(Cell("lightning_ep/ep=2", 4, 4096, 2), "NVIDIA H200")
    assert parts is not None
    weights = sum(parts.pop(name) for name in ("AdamW", "norm", "casts"))
    layers = 12 * (2.9 + 4.0 + 6.0 + 1.7 + 0.8 + 1.0)
    assert sum(parts.values()) == pytest.approx(layers + 55)
    rate = costs.estimate_tokens_per_second(Cell("lightning_ep/ep=2", 4, 4096, 2), "NVIDIA H200")
    assert rate == pytest.approx(4 * 4096 / (layers + 55 + weights) * 1e3)
    # That budget has another optimizer, casts its gradients, and does not clip.
    budget = layers + 12 * 0.9 + 55 + 32
    assert weights == pytest.approx(12 * 0.9 + 32, rel=0.1)
    assert 4 * 4096 / budget * 1e3 == pytest.approx(55_000, rel=0.02)


def test_estimate_scales_with_the_cell() -> None:
    base = costs.estimate_ms(Cell("lightning_ep/ep=2", 4, 4096, 2), "NVIDIA H200")
    long = costs.estimate_ms(Cell("lightning_ep/ep=1", 1, 16_384, 2), "NVIDIA H100 80GB HBM3")
    assert base is not None
    assert long is not None
    assert long["attention core"] / base["attention core"] == pytest.approx(16_385 / 4_097)
    assert long["dispatch and combine"] == 0
    sharded = costs.estimate_ms(Cell("lightning_ep/ep=1", 4, 4096, 2), "NVIDIA H200")
    assert sharded is not None
    assert long["AdamW"] / sharded["AdamW"] == pytest.approx(4.8 / 3.35)
    # Gradients that FSDP reduces are fp32: 28 bytes for each parameter of an expert in place of 26.
    assert sharded["AdamW"] / base["AdamW"] == pytest.approx(28 / 26, rel=0.01)
    assert costs.estimate_ms(Cell("transformers/fsdp2", 4, 4096, 2), "NVIDIA H200") is None


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([], []),
        ([(0, 0)], []),
        ([(3, 5), (0, 1)], [(0, 1), (3, 5)]),
        ([(0, 4), (1, 2), (4, 6), (5, 7)], [(0, 7)]),
    ],
)
def test_union_of_intervals(intervals: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    assert trace.union(intervals) == expected


def test_exposed_communication_is_what_no_kernel_covers() -> None:
    kernels = [
        trace.Kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 0, 4_000),
        trace.Kernel("nvjet_tst_128x256", 1_000, 2_000),
        trace.Kernel("elementwise_kernel", 1_500, 3_000),  # overlaps with the one before
        trace.Kernel("ncclDevKernel_AllGather_RING_LL", 3_500, 5_000),  # overlaps with the first
        trace.Kernel("elementwise_kernel", 6_000, 6_500),
    ]
    found = trace.summary(kernels)
    assert found["gpu_busy_ms"] == 5.5
    assert found["communication_ms"] == 5.0
    assert found["exposed_communication_ms"] == 3.0
    assert found["launches"] == 5
    assert {"name": "elementwise_kernel", "ms": 2.0, "count": 2} in found["kernels"]


def test_kernels_are_named_by_stage() -> None:
    kernels = [
        trace.Kernel("ncclDevKernel_SendRecv", 0, 500),
        trace.Kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", 0, 700),
        trace.Kernel("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", 0, 800),
        trace.Kernel("cutlass::device_kernel<GemmUniversal<GroupProblemShape>>", 0, 1_000),
        trace.Kernel("at::native::radixSortKVInPlace", 0, 2_000),
        trace.Kernel("Memcpy DtoD (Device -> Device)", 0, 3_000),
        trace.Kernel("at::native::index_elementwise_kernel", 0, 4_000),
        trace.Kernel("_gated_activation_kernel", 0, 5_000),
        trace.Kernel("at::native::vectorized_elementwise_kernel", 0, 6_000),
    ]
    assert trace.by_stage(kernels) == {
        "elementwise": 6.0,
        "Triton": 5.0,
        "gather, scatter, index": 4.0,
        "memcpy and memset": 3.0,
        "sort and scan": 2.0,
        "grouped GEMM": 1.0,
        "dense GEMM": 0.8,
        "attention": 0.7,
        "NCCL": 0.5,
    }


def test_ranks_merge_to_the_slowest_of_each_step() -> None:
    common = {"launch_ms": 1.0, "process_cpu_ms": 2.0, "max_over_mean_tokens_per_expert": 1.5}
    ranks = [
        {**common, "step_ms": [10.0, 30.0, 20.0], "first_loss": 5.0, "last_loss": 4.0, "peak_allocated_gib": 7.0},
        {**common, "step_ms": [20.0, 10.0, 20.0], "first_loss": 5.2, "last_loss": 4.2, "peak_allocated_gib": 9.0},
    ]
    merged = merge(_tiny("lightning_ep/ep=2"), ranks)
    assert merged["step_ms"] == 20.0
    assert merged["tokens_per_second"] == 32 / 0.020
    assert merged["tokens_per_second_p10"] == pytest.approx(32 / 0.028)
    assert merged["peak_allocated_gib"] == 9.0
    assert merged["first_loss"] == pytest.approx(5.1)
    ranks[1]["last_loss"] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        merge(_tiny("lightning_ep/ep=2"), ranks)


def test_quantiles_interpolate() -> None:
    assert [quantile([3.0, 1.0, 2.0], q) for q in (0, 0.25, 0.5, 1)] == [1.0, 1.5, 2.0, 3.0]


@pytest.mark.parametrize("text", ["4096", "4x", "0x16", "axb", "4x1"])
def test_bad_shapes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="4x4096"):
        parse_shape(text)


def test_unknown_trainers_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"megatron.*torchtitan/ep"):
        Cell("megatron", 1, 16, 1)


@pytest.mark.parametrize(
    ("trainer", "recompute", "compiled"),
    [
        ("lightning_ep/ep=2", "none", False),
        ("lightning_ep/ep=2+full", "full", False),
        ("lightning_ep/ep=2+selective+compile", "selective", True),
        ("transformers/ep+full+compile", "full", True),
        ("torchtitan/ep+full", "full", False),
    ],
)
def test_suffixes_say_what_is_recomputed_and_compiled(trainer: str, recompute: str, compiled: bool) -> None:
    cell = Cell(trainer, 1, 16, 2)
    assert (cell.base, cell.recompute, cell.compile) == (trainer.partition("+")[0], recompute, compiled)
    assert cell.ep == 2


@pytest.mark.parametrize(
    "trainer",
    ["lightning_ep/ep=2+compile+full", "lightning_ep/ep=2+all", "transformers/ep+selective", "torchtitan/ep+compile"],
)
def test_unknown_suffixes_are_refused_with_the_choices(trainer: str) -> None:
    with pytest.raises(ValueError, match=r"\+selective\|\+full"):
        Cell(trainer, 1, 16, 2)


def test_recompute_is_compared_with_recompute() -> None:
    plain, ours, theirs = (
        Cell(t, 1, 16, 2) for t in ("lightning_ep/ep=2", "lightning_ep/ep=2+full", "torchtitan/ep+full")
    )
    assert ours.case == theirs.case != plain.case
    assert costs.estimate_ms(plain, "NVIDIA H200") is not None
    assert costs.estimate_ms(theirs, "NVIDIA H200") is None


# ---------------------------------------------------------------------- routers


def test_skewed_router_is_a_router_with_the_bias_and_skews() -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    gate = Qwen3MoeTopKRouter(Cell("lightning_ep/ep=1", 1, 2, 1).config())
    torch.nn.init.normal_(gate.weight, std=0.02)
    hidden = torch.randn(4096, 2048)
    balanced = router.Popularity([gate])
    plain = gate(hidden)
    assert balanced.read() < 1.6
    with torch.no_grad():
        router.change_transformers_router(gate, bias_E=router.zipf_bias(128, 3))
    skewed = router.Popularity([gate])
    logits, weights, ids = gate(hidden)
    torch.testing.assert_close(logits, plain[0] + router.zipf_bias(128, 3))
    probabilities = logits.softmax(-1)
    expected = probabilities.gather(1, ids)
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True))
    assert torch.equal(ids, probabilities.topk(8).indices)
    assert 3 < skewed.read() < 8


def test_routers_of_a_rehearsal_tell_experts_apart() -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    cell = Cell("lightning_ep/ep=8", 1, 2, 8, rehearse=True)
    gate = Qwen3MoeTopKRouter(cell.config())
    with torch.no_grad():
        gate.weight.copy_(0.02 * torch.randn(16, 2048).repeat(8, 1))  # eight ranks with the same shard
    hidden = torch.randn(512, 2048)

    def ranks_per_token() -> float:
        *_, ids = gate(hidden)
        return sum(len(set(chosen)) for chosen in (ids // 16).tolist()) / 512

    assert ranks_per_token() > 7.9
    model = SimpleNamespace(model=SimpleNamespace(layers=[SimpleNamespace(mlp=SimpleNamespace(gate=gate))]))
    popularity = router.prepare_transformers_routers(model, cell, torch.device("cpu"))
    assert ranks_per_token() == pytest.approx(8 * (1 - math.comb(112, 8) / math.comb(128, 8)), abs=0.4)
    assert popularity.read() < 2.5


def test_fill_draws_every_parameter_and_no_buffer() -> None:
    with torch.device("meta"):
        module = torch.nn.ModuleDict({"norm": torch.nn.RMSNorm(8), "linear": torch.nn.Linear(64, 64, bias=False)})
        module.register_buffer("table", torch.zeros(2))
    fill_parameters(module, torch.device("cpu"))
    assert module["norm"].weight.eq(1).all()
    assert module["linear"].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert module.table.is_meta


# ---------------------------------------------------------------------- cells


@pytest.mark.parametrize(
    ("trainer", "ranks", "router_name"),
    [
        ("lightning_ep/ep=2+full", 2, "skewed"),
        ("transformers/ep+full", 2, "balanced"),
        ("lightning_ep/ep=1,cp=2", 2, "balanced"),
        ("lightning_ep/ep=2,tp=2", 2, "balanced"),
        ("transformers/single", 1, "skewed"),
    ],
)
def test_a_cell_measures(trainer: str, ranks: int, router_name: str) -> None:
    record = run_cell(_tiny(trainer, ranks, router=router_name), timeout=60)
    assert record["status"] == "ok", record
    assert record["tokens_per_second_p10"] <= record["tokens_per_second"] <= record["tokens_per_second_p90"]
    assert record["first_loss"] == pytest.approx(math.log(128), abs=0.1)
    assert record["launch_ms"] > 0
    assert 1 < record["max_over_mean_tokens_per_expert"] <= 2  # eight experts, top-4
    assert record["device_name"] == "CPU"
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("trainer", ["lightning_ep/ep=8+full", "lightning_ep/ep=2", "transformers/fsdp2"])
def test_one_rank_of_eight_is_rehearsed(trainer: str) -> None:
    record = run_cell(_tiny(trainer, 8, rehearse=True), timeout=60)
    assert record["status"] == "ok", record
    assert record["first_loss"] == pytest.approx(math.log(128), abs=0.1)
    assert record["cell"]["ranks"] == 8


def test_what_needs_its_peers_is_not_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    cells: list[Cell] = []
    monkeypatch.setattr(command, "run", lambda matrix, *args, **kwargs: cells.extend(matrix))
    command.main(["--rehearse", "--ranks", "8", "--tokens", "1x16", "--router", "balanced", "skewed"])
    assert {cell.base for cell in cells} == {"lightning_ep/ep=8", "lightning_ep/ep=1", "transformers/fsdp2"}
    assert all(cell.rehearse and cell.router == "balanced" for cell in cells)
    other: list[tuple[str, dict[str, Any]]] = [("lightning_ep/ep=8", {"task": "weights"}), ("transformers/ep", {})]
    for trainer, settings in (*other, ("lightning_ep/ep=8", {"router": "skewed"})):
        with pytest.raises(ValueError, match=r"cannot be rehearsed: train lightning_ep/ep=N or transformers/fsdp2"):
            _tiny(trainer, 8, rehearse=True, **settings)


def test_ranks_that_share_sequences_count_their_tokens_once() -> None:
    shared, alone = (Cell(f"lightning_ep/ep=2{cp}+compile", 1, 65_536, 2) for cp in (",cp=2", ""))
    assert (shared.ep, shared.cp, shared.compile, shared.tokens) == (2, 2, True, 32_768)
    assert (alone.ep, alone.cp, alone.tokens) == (2, 1, 65_536)
    split = Cell("lightning_ep/ep=2,tp=2+full", 1, 65_536, 2)
    assert (split.ep, split.cp, split.tp, split.recompute, split.tokens) == (2, 1, 2, "full", 32_768)
    with pytest.raises(ValueError, match="does not exist; choose one of lightning_ep/ep=N\\[,cp=M\\]\\[,tp=M\\]"):
        Cell("lightning_ep/ep=2,cp=", 1, 65_536, 2)


def test_a_cell_that_raises_is_recorded_with_its_error() -> None:
    record = run_cell(_tiny("lightning_ep/ep=3", 1), timeout=60)
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
    assert worker.status(error) == expected
    assert worker.last_line(RuntimeError("two\n lines")) == "RuntimeError: two lines"


def test_a_cell_that_hangs_is_ended_and_recorded() -> None:
    record = run_cell(_tiny("transformers/single", 1), timeout=0.5)
    assert record["status"] == "timed out"
    assert record["seconds"] < 10


def test_torchtitan_is_skipped_with_a_reason_where_it_cannot_run() -> None:
    record = run_cell(_tiny("torchtitan/ep", 2), timeout=60)
    assert (record["status"], record["error"]) == ("skipped", "torchtitan needs a GPU")


def test_a_meter_refuses_results_of_a_run_cut_short() -> None:
    meter = Meter(_tiny("lightning_ep/ep=1", 1), torch.device("cpu"))
    meter.step_ended(torch.zeros(()))
    with pytest.raises(RuntimeError, match="only 1 of 6"):
        meter.results()


# ---------------------------------------------------------------------- the command


def _recorder(calls: list[str], status: str = "ok") -> Any:
    """Stands in for the processes of a cell, whose measurements the tests above check."""

    def measure(cell: Cell, timeout: float, folder: Path | None) -> dict[str, Any]:
        calls.append(cell.trainer)
        record = {"cell": vars(cell), "device_name": "CPU", "date": "2026-01-01", "seconds": 1.0, "status": status}
        if status != "ok":
            return {**record, "error": "OutOfMemoryError: CUDA out of memory"}
        rate = 100.0 * (1 + len(calls))
        return {
            **record,
            **dict.fromkeys(("tokens_per_second", "tokens_per_second_p10", "tokens_per_second_p90"), rate),
            "step_ms": 1.0,
            "first_loss": 5.0,
            "last_loss": 4.0,
            "launches": 7,
            "by_stage": {"grouped GEMM": 3.0, "attention": rate / 100},
            "machine": {"device_name": "CPU", "versions": {"torch": "2"}},
        }

    return measure


def _timed(cells: list[Cell]) -> dict[Cell, float]:
    return dict.fromkeys(cells, 60)


def test_recorded_cells_are_skipped_and_a_cut_line_is_repeated(tmp_path: Path) -> None:
    path, calls = tmp_path / "new" / "records.jsonl", []
    cells = [_tiny("lightning_ep/ep=2"), _tiny("transformers/fsdp2"), _tiny("transformers/ep")]
    assert command.run(_timed(cells[:2]), path, 600, measure=_recorder(calls))
    path.write_text(path.read_text()[:-20])  # the process was killed while it wrote the second
    assert command.run(_timed(cells), path, 600, measure=_recorder(calls))
    assert calls == ["lightning_ep/ep=2", "transformers/fsdp2", "transformers/fsdp2", "transformers/ep"]
    assert [record["cell"]["trainer"] for record in read(path)] == [cell.trainer for cell in cells]
    assert command.run(_timed(cells), path, 600, measure=_recorder(calls))
    assert len(calls) == 4
    assert "| transformers/ep |" in path.with_suffix(".md").read_text()


def test_out_of_memory_is_recorded_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, calls = tmp_path / "records.jsonl", []
    first, second = _tiny("transformers/fsdp2"), _tiny("lightning_ep/ep=2")
    assert command.run(_timed([first]), path, 600, measure=_recorder(calls, "out of memory"))
    assert command.run(_timed([first, second]), path, 600, measure=_recorder(calls))
    assert calls == ["transformers/fsdp2", "lightning_ep/ep=2"]
    assert "| transformers/fsdp2 | out of memory |" in capsys.readouterr().out
    assert command.run(_timed([first, second]), path, 600, retry_failed=True, measure=_recorder(calls))
    assert calls[2:] == ["transformers/fsdp2"]
    assert read(path)[-1]["status"] == "ok"


def test_a_spent_budget_stops_before_the_next_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    assert not command.run(_timed([_tiny("lightning_ep/ep=2")]), tmp_path / "r.jsonl", 10, measure=_recorder(calls))
    assert calls == []
    assert "goes on" in capsys.readouterr().out


def test_every_default_trainer_exists() -> None:
    for ranks in (1, 2, 8):
        for trainer in default_trainers(ranks):
            assert Cell(trainer, 1, 16, ranks).ranks == ranks


# ---------------------------------------------------------------------- layers alone, report


def test_moe_layer_measures_the_same_maths_as_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    cpu, sizes = torch.device("cpu"), SIZES["tiny"]
    ours = moe_layer.forward_backward(moe_layer.our_experts(sizes, cpu, torch.float32))
    theirs = moe_layer.forward_backward(moe_layer.transformers_experts(sizes, cpu, torch.float32, "eager"))
    inputs = moe_layer._inputs(sizes, 24, "skewed", 0, cpu, torch.float32)
    for mine, reference in zip(ours(*inputs), theirs(*inputs), strict=True):
        mine = getattr(mine, "to_local", lambda value=mine: value)()
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)
    rows = moe_layer.measure(sizes, 24, cpu, torch.float32, repeats=2)
    assert [row["router"] for row in rows] == ["balanced", "balanced", "skewed", "skewed", "even"]
    assert all(row["ms"] > 0 for row in rows)
    assert "six grouped GEMMs" in report.moe_table({"tokens": 24, "dtype": "torch.float32", "rows": rows})


def test_losses_agree_with_the_plain_one() -> None:
    rows = loss.measure(40, 16, 50, torch.device("cpu"), torch.float32, repeats=2)
    assert "plain" in [row["name"] for row in rows]
    measured = [row for row in rows if "error" not in row]
    assert all(row["relative_difference"] < 1e-5 for row in measured)
    assert "| plain |" in report.loss_table({"tokens": 40, "hidden": 16, "vocab": 50, "rows": rows})


def test_page_without_runs_says_so(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    report.main(["--page", str(page)])
    assert page.read_text().count("Not measured yet") == 3


def test_page_compares_with_the_best_peer_of_the_same_case(tmp_path: Path) -> None:
    path, calls = tmp_path / "r.jsonl", []
    cells = [_tiny(t) for t in ("transformers/fsdp2", "transformers/ep", "lightning_ep/ep=2")]
    for cell in cells:
        append(path, {**_recorder(calls)(cell, 1, None), "command": "python -m benchmarks.train --some"})
    other = {**_recorder(calls)(_tiny("transformers/ep", layers=2), 1, None), "command": "x"}
    append(path, other)
    report.main(["--train", str(path), "--page", str(tmp_path / "performance.md")])
    text = (tmp_path / "performance.md").read_text()
    assert "| lightning_ep/ep=2 | 400 (400 to 400) | 1.33 |" in text
    assert "| transformers/fsdp2 | 200 (200 to 200) | 0.67 |" in text
    assert "python -m benchmarks.train --some" in text
    assert "| GPU ms of a step by kind of kernel (rank 0) | attention | grouped GEMM | launches |" in text
    assert "| lightning_ep/ep=2 | 4.0 | 3.0 | 7 |" in text


def test_plot_is_drawn_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [_recorder([])(_tiny(trainer), 1, None) for trainer in ("transformers/fsdp2", "lightning_ep/ep=2")]
    assert report.draw(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not report.draw([], tmp_path / "none.png")
