"""LoRA on W ranks equals PEFT on one process: loss, each gradient, the clipped norm, adapters after 3 steps."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity import assert_trains_like_one_process


def _case(where: str, **options: Any) -> dict[str, Any]:
    return {"causal": True, "accumulate": 1, "clip": None, "adapter": where, **options}


CLIPPED = _case("both", clip=0.02)
RECOMPUTED = _case("experts", recompute="full", accumulate=3)
COMPILED = _case("both", clip=0.2, recompute="full", compile="inductor")
TRANSFORMERS_KERNELS = _case("both", clip=0.2, implementation="eager")
IN_BF16 = _case("both", clip=0.2, precision="bf16-mixed", recompute="full")
USERS = _case("both", causal=False, accumulate=3, clip=0.2, recompute="selective")


@pytest.mark.parametrize(("world", "layout"), [(1, {"ep": 1}), (2, {"ep": 2}), (2, {"ep": 1})])
def test_training_equals_peft(world: int, layout: dict[str, int]) -> None:
    assert_trains_like_one_process(world, layout, [CLIPPED, RECOMPUTED])


@pytest.mark.slow
@pytest.mark.timeout(330)  # that of the ranks must come first
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {"ep": 1}),
        (2, {"ep": 2}),
        (2, {"ep": 1}),
        (2, {"ep": 2, "tp": 2}),
        (2, {"ep": 2, "cp": 2}),
        (4, {"ep": 4}),
        (4, {"ep": 2}),
        (4, {"ep": 2, "tp": 2}),
        (4, {"ep": 2, "replicate": 2}),
        (4, {"ep": 1, "cp": 2}),
    ],
)
def test_everything_with_it_equals_peft_on_every_layout(world: int, layout: dict[str, int]) -> None:
    cases = [
        CLIPPED,
        RECOMPUTED,
        COMPILED,
        TRANSFORMERS_KERNELS,
        USERS,
        IN_BF16,
        _case("attention", clip=0.2, recompute="full"),
    ]
    assert_trains_like_one_process(world, layout, cases, timeout=300)
