"""Every stage of a family's life, on two ranks against one process, is what docs/reference/models.md says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.hub.every_family import FAMILIES
from tests.reference import why_no_adapters
from tests.survey import STAGES, path_of, survey

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "models.md"
# Fused and not, latent and linear attention, undecorated experts, towers, routers and experts of other kinds. Each has
# one stage or two that others lack; whole rows are slow.
SHORT = {
    "deepseek_v3": ["cp"],
    "ernie4_5_vl_moe": ["image"],
    "gpt_oss": ["lora"],
    "lfm2_moe": ["recompute"],
    "mixtral": ["tp"],
    "nemotron_h": ["gradients"],
    "qwen3_5_moe": ["image"],
    "qwen3_omni_moe_thinker": ["image"],
    "qwen3_vl_moe": ["image", "export"],
    "step3p7": ["gradients", "load"],
}


def _row(family: str) -> dict[str, str]:
    (line,) = re.findall(rf"^\| `{family}` \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    *cells, path = [cell.strip() for cell in line.split("|")]
    return {**dict(zip(STAGES, cells, strict=True)), "path": path}


def _check(family: str, stages: list[str] | None, timeout: float) -> None:
    if stages == ["lora"] and (reason := why_no_adapters()) is not None:
        pytest.skip(reason)
    row = _row(family)
    found = survey(family, stages, timeout)
    assert found
    wrong = {stage: what for stage, what in found.items() if ("no" if what else "yes") != row[stage]}
    assert not wrong, wrong
    assert row["path"] == ("fused" if path_of(family) == "fused" else "transformers")


@pytest.mark.parametrize("family", SHORT)
def test_ten_families_do_what_the_page_says(family: str) -> None:
    _check(family, SHORT[family], 90)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_does_what_the_page_says(family: str) -> None:
    _check(family, None, 300)
