"""Memory of the planner against its parts by hand, and against what GPUs allocated (benchmarks/results)."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_ep.planner import (
    QWEN3_30B_A3B,
    Case,
    allocatable_gib,
    expert_parameters,
    find_device,
    memory_gib,
    num_parameters,
    peak_gib,
)

GIB = 2**30
H200 = find_device("NVIDIA H200")
assert H200 is not None
LIMIT = allocatable_gib(H200)


def _peak(shape: tuple[int, int] = (4, 4096), ranks: int = 8, layers: int = 48, **settings: Any) -> float:
    return peak_gib(Case(QWEN3_30B_A3B, layers, *shape, ranks, **settings), LIMIT)


@pytest.mark.parametrize(
    ("shape", "recompute", "gib"),  # one H200, 6 layers
    [
        ((4, 4096), "none", 75.2),
        ((4, 4096), "selective", 71.9),
        ((4, 4096), "full", 69.3),
        ((1, 4_096), "none", 70.2),
        ((1, 16_384), "none", 75.2),
        ((1, 32_768), "full", 70.1),
    ],
)
def test_estimates_are_close_to_what_one_gpu_allocated(shape: tuple[int, int], recompute: str, gib: float) -> None:
    assert _peak(shape, 1, 6, recompute=recompute) == pytest.approx(gib, abs=0.2)


@pytest.mark.parametrize(
    ("shape", "settings", "gib"),  # two H200, 12 layers
    [
        ((4, 4096), {"ep": 2}, 78.8),
        ((4, 4096), {"ep": 2, "recompute": "full"}, 65.7),
        ((1, 4096), {"ep": 2}, 68.3),
        ((1, 16_384), {"ep": 2}, 79.1),
        ((4, 4096), {}, 78.0),
        ((1, 65_536), {"ep": 2, "cp": 2}, 97.3),
        ((1, 65_536), {"cp": 2}, 93.5),
    ],
)
def test_estimates_are_close_to_what_two_gpus_allocated(
    shape: tuple[int, int], settings: dict[str, Any], gib: float
) -> None:
    assert _peak(shape, 2, 12, **settings) == pytest.approx(gib, rel=0.05)


def test_memory_scales_with_layout_and_recompute() -> None:
    by_mode = {mode: _peak(ep=8, recompute=mode) for mode in ("none", "selective", "full")}
    experts = 48 * expert_parameters(QWEN3_30B_A3B) / GIB
    others = num_parameters(QWEN3_30B_A3B, 48) / GIB - experts
    state = 16 * (experts + others) / 8  # gradients of experts in bf16, and bf16 copies of their weights
    rows = 8 * (1 - math.comb(112, 8) / math.comb(128, 8))  # of 4 KiB, and 24 KiB of pairs
    assert by_mode["selective"] - by_mode["full"] == pytest.approx(48 * 16_384 * (4 * rows + 24) * 1024 / GIB)
    assert state < by_mode["full"] < 76 < by_mode["selective"] < by_mode["none"] < LIMIT
    # Where copies do not fit any more: 14 bytes.
    larger = (14 * experts + 16 * others) / 4
    assert _peak(ep=4, ranks=4, recompute="full") - by_mode["full"] == pytest.approx(larger - state, rel=0.02)
    assert _peak((1, 32_768), ep=8, recompute="selective") > 0.98 * LIMIT


def test_copies_are_kept_where_a_tenth_of_the_memory_stays_free() -> None:
    case = Case(QWEN3_30B_A3B, 48, 4, 4096, 8, ep=8, recompute="full")
    roomy, tight = memory_gib(case, 76.0), memory_gib(case, 72.0)
    copies = 2 * 48 * expert_parameters(QWEN3_30B_A3B) / 8 / GIB
    assert roomy.pop("copies of experts in bf16") == pytest.approx(copies)
    assert tight.pop("copies of experts in bf16") == 0
    assert roomy == tight
    assert 72 - sum(roomy.values()) - copies < 7.2 < 76 - sum(roomy.values()) - copies


def test_a_cap_stands_in_for_a_smaller_card() -> None:
    assert allocatable_gib(H200, 76.0) == 76
    assert allocatable_gib(H200, 500.0) == LIMIT == 135
