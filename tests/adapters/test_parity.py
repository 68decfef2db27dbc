"""LoRA on W ranks equals PEFT on one process: loss, each gradient, the clipped norm, adapters after 3 steps."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity import assert_trains_like_one_process


def _case(where: str, **options: Any) -> dict[str, Any]:
    return {"causal": True, "accumulate": 1, "clip": None, "adapter": where, **options}


@pytest.mark.parametrize(("world", "layout"), [(1, {"ep": 1}), (2, {"ep": 2}), (2, {"ep": 1})])
def test_training_equals_peft(world: int, layout: dict[str, int]) -> None:
    assert_trains_like_one_process(
        world, layout, [_case("both", clip=0.02), _case("experts", recompute="full", accumulate=3)]
    )
