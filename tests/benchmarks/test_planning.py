"""docs/choose/planning.md shows what the planner says today: its table, its picture, and the output of its commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.planning import PICTURE, by_ep, description, estimates, measured, published, question
from lightning_ep import cli
from lightning_ep.planner import QWEN3_30B_A3B, Case, tokens_per_second
from lightning_ep.planner.devices import GPUS

PAGE = (Path(__file__).parents[2] / "docs" / "choose" / "planning.md").read_text()
SHOWN = re.findall(r"```bash\n(lightning-ep plan [^`]*?)```\n\n<!-- run: [^\n]*\n```text\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_has_the_table_and_the_picture_of_today() -> None:
    assert estimates() in PAGE, "python -m benchmarks.planning prints it"
    assert question() in PAGE, "python -m benchmarks.planning prints it"
    assert published() in PAGE, "python -m benchmarks.planning prints it"
    assert description() in PICTURE.read_text(), "python -m benchmarks.planning draws it"
    assert f"({PICTURE.name})" in PAGE
    assert list(by_ep(8, 4096)) == [1, 2, 4, 8]


def test_estimates_are_as_close_as_the_page_says() -> None:
    rates = [one.rate / one.estimated_rate for one in measured()]
    memory = [one.gib / one.estimated_gib for one in measured()]
    assert len(rates) == 19
    assert f"{min(rates):.2f} to {max(rates):.2f} of the estimated speed" in PAGE
    assert f"{min(memory):.2f} to {max(memory):.2f} of the estimated memory" in PAGE
    assert all(0.8 < rate < 1.2 for rate in rates)
    assert all(0.9 < gib < 1.1 for gib in memory)


def test_the_page_compares_with_what_is_estimated_now() -> None:
    for settings in (
        {"batch": 1, "ranks": 1, "lora_rank": 16, "lora_experts": False},
        {"batch": 2, "ranks": 1, "lora_rank": 16, "lora_experts": False},
    ):
        case = Case(QWEN3_30B_A3B, 48, sequence=4096, recompute="full", **settings)  # type: ignore[arg-type]
        assert f"{tokens_per_second(case, GPUS['H100']):,.0f}" in PAGE, case


def test_measured_figures_are_those_of_the_records() -> None:
    records = "".join(path.read_text() for path in (Path(__file__).parents[2] / "benchmarks" / "results").glob("*.md"))
    for one in measured():
        assert re.search(rf"\| {one.rate:,}\b.*\| {one.gib}\b", records), one


@pytest.mark.parametrize(("command", "output"), SHOWN)
def test_the_page_shows_what_the_command_prints(command: str, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(shlex.split(command.replace("\\\n", " "))[1:])
    assert capsys.readouterr().out == output


def test_the_page_shows_commands() -> None:
    assert len(SHOWN) >= 2
