"""docs/choose/planning.md and resources.md show what the planner says today: tables, a picture, output of commands."""

from __future__ import annotations

import re
import shlex

import pytest

from lightning_ep import cli
from lightning_ep.planner import QWEN3_30B_A3B, Case, tokens_per_second
from lightning_ep.planner.devices import GPUS
from tests.docs.pages import ROOT, extension

planned = extension("planned")
PLANNING, RESOURCES = (path.read_text() for path in planned.PAGES)
SHOWN = re.findall(
    r"```bash\n(lightning-ep plan [^`]*?)```\n\n<!-- run: [^\n]*\n```text\n(.*?)```", PLANNING, re.DOTALL
)
RECORDS = "".join(path.read_text() for path in (ROOT / "benchmarks/results").glob("*.md"))


def test_the_tables_and_the_picture_are_those_of_today() -> None:
    tables = planned.shown(PLANNING)
    assert set(tables) == {"question", "estimates", "published"}
    for name, table in tables.items():
        assert table == planned.TABLES[name](), "python docs/_ext/planned.py writes it"
    assert planned.description() in planned.PICTURE.read_text(), "python docs/_ext/planned.py draws it"
    assert f"({planned.PICTURE.name})" in PLANNING
    assert list(planned.by_ep(8, 4096)) == [1, 2, 4, 8]


@pytest.mark.parametrize("method", planned.METHODS)
def test_what_fits_on_few_gpus_is_what_the_planner_says(method: str) -> None:
    few = [number for number, (ranks, _) in enumerate(planned.MACHINES) if ranks <= 4]
    rows = planned.shown(RESOURCES)[method].splitlines()[2:]
    for model, row in zip(planned.MODELS, rows, strict=True):
        cells = row.split(" | ")[1:]
        for number in few:
            assert cells[number].strip(" |") == planned.cell(method, model, *planned.MACHINES[number]), (model, number)


@pytest.mark.slow
@pytest.mark.parametrize("method", planned.METHODS)
def test_what_fits_where_is_what_the_planner_says(method: str) -> None:
    assert planned.shown(RESOURCES)[method] == planned.TABLES[method](), "python docs/_ext/planned.py writes it"


def test_estimates_are_as_close_as_the_page_says() -> None:
    rates = [one.rate / one.estimated_rate for one in planned.measured()]
    memory = [one.gib / one.estimated_gib for one in planned.measured()]
    assert len(rates) == 24
    assert f"{min(rates):.2f} to {max(rates):.2f} of the estimated speed" in PLANNING
    assert f"{min(memory):.2f} to {max(memory):.2f} of the estimated memory" in PLANNING
    assert all(0.8 < rate < 1.2 for rate in rates)
    assert all(0.9 < gib < 1.1 for gib in memory)


def test_the_page_compares_with_what_is_estimated_now() -> None:
    for settings in (
        {"batch": 1, "ranks": 1, "lora_rank": 16, "lora_experts": False},
        {"batch": 2, "ranks": 1, "lora_rank": 16, "lora_experts": False},
    ):
        case = Case(QWEN3_30B_A3B, 48, sequence=4096, recompute="full", **settings)  # type: ignore[arg-type]
        assert f"{tokens_per_second(case, GPUS['H100']):,.0f}" in PLANNING, case


def test_measured_figures_are_those_of_the_records() -> None:
    for one in planned.measured():
        assert re.search(rf"\| {one.rate:,}\b.*\| {one.gib}\b", RECORDS), one
    whole = [found for (_, *machine), found in planned.measured_whole().items() if tuple(machine) in planned.MACHINES]
    assert len(whole) == 2
    for rate, gib in whole:
        assert f"| **{rate:,}** ({gib:.0f}) |" in RESOURCES


@pytest.mark.parametrize(("command", "output"), SHOWN)
def test_the_page_shows_what_the_command_prints(command: str, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(shlex.split(command.replace("\\\n", " "))[1:])
    assert capsys.readouterr().out == output


def test_the_page_shows_commands() -> None:
    assert len(SHOWN) >= 2
