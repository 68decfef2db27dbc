"""What is measured of a step: kernels of a profile, ranks put together; against numbers made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.cells import Cell
from benchmarks.measure import Kernel, Meter, merge, summary
from benchmarks.records import quantile

CELL = Cell("lightning_ep/ep=2", 2, 16, 2, "tiny", 1, steps=3, warmup=1, device="cpu")


def test_exposed_communication_is_what_no_kernel_covers() -> None:
    kernels = [
        Kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 0, 4_000),
        Kernel("nvjet_tst_128x256", 1_000, 2_000),
        Kernel("elementwise_kernel", 1_500, 3_000),  # overlaps with the one before
        Kernel("ncclDevKernel_AllGather_RING_LL", 3_500, 5_000),  # overlaps with the first
        Kernel("elementwise_kernel", 6_000, 6_500),
        Kernel("nothing", 7_000, 7_000),
    ]
    found = summary(kernels)
    assert found["gpu_busy_ms"] == 5.5
    assert found["communication_ms"] == 5.0
    assert found["exposed_communication_ms"] == 3.0
    assert found["launches"] == 6
    assert found["by_kind"]["elementwise"] == 2.0


def test_kernels_are_named_by_kind() -> None:
    names = [
        "ncclDevKernel_SendRecv",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT",
        "cutlass::device_kernel<GemmUniversal<GroupProblemShape>>",
        "at::native::radixSortKVInPlace",
        "Memcpy DtoD (Device -> Device)",
        "at::native::index_elementwise_kernel",
        "_gated_activation_kernel",
        "at::native::vectorized_elementwise_kernel",
        "something else",
    ]
    kernels = [Kernel(name, 0, 1_000 * (number + 1)) for number, name in enumerate(names)]
    assert list(summary(kernels)["by_kind"].items()) == [
        ("other", 10.0),
        ("elementwise", 9.0),
        ("Triton", 8.0),
        ("gather, scatter, index", 7.0),
        ("memcpy and memset", 6.0),
        ("sort and scan", 5.0),
        ("grouped GEMM", 4.0),
        ("dense GEMM", 3.0),
        ("attention", 2.0),
        ("NCCL", 1.0),
    ]


def test_ranks_merge_to_the_slowest_of_each_step() -> None:
    common = {"launch_ms": 1.0, "max_over_mean_tokens_per_expert": 1.5}
    ranks = [
        {**common, "steps_ms": [10.0, 30.0, 20.0], "first_loss": 5.0, "last_loss": 4.0, "peak_allocated_gib": 7.0},
        {**common, "steps_ms": [20.0, 10.0, 20.0], "first_loss": 5.2, "last_loss": 4.2, "peak_allocated_gib": 9.0},
    ]
    merged = merge(CELL, ranks)
    assert merged["steps_ms"] == [20.0, 30.0, 20.0]
    assert merged["step_ms"] == 20.0
    assert merged["tokens_per_second"] == 32 / 0.020
    assert merged["tokens_per_second_p10"] == pytest.approx(32 / 0.028)
    assert merged["peak_allocated_gib"] == 9.0
    assert merged["first_loss"] == pytest.approx(5.1)
    ranks[1]["last_loss"] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        merge(CELL, ranks)


def test_quantiles_interpolate() -> None:
    assert [quantile([3.0, 1.0, 2.0], q) for q in (0, 0.25, 0.5, 1)] == [1.0, 1.5, 2.0, 3.0]


def test_a_meter_leaves_the_warm_up_out_and_asks_for_the_first_and_last_loss() -> None:
    meter = Meter(CELL, torch.device("cpu"))
    asked = []
    for step in range(meter.num_steps):
        meter.step_ended(lambda step=step: asked.append(step) or torch.tensor(float(step)))  # type: ignore[misc]
    found = meter.results()
    assert asked == [1, 3]
    assert (found["first_loss"], found["last_loss"]) == (1.0, 3.0)
    assert len(found["steps_ms"]) == 3
    assert found["launch_ms"] > 0


def test_a_meter_refuses_results_of_a_run_cut_short() -> None:
    meter = Meter(CELL, torch.device("cpu"))
    meter.step_ended(lambda: torch.zeros(()))
    with pytest.raises(RuntimeError, match="only 1 of 7"):
        meter.results()
