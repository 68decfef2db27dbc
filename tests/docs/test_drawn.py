"""Pictures and tables that programs make are those of today; pages and keys that are named exist."""

from __future__ import annotations

import importlib
import re

import pytest

from benchmarks.resources import MEASURED, METHODS, PAGE, section
from tests.docs.command_lines import why_not
from tests.docs.pages import ROOT


def test_pictures_are_those_that_the_script_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs/_ext")
    for path, content in importlib.import_module("pictures").files().items():
        assert path.read_text() == content, "python docs/_ext/pictures.py draws it"


LONG = "All weights, 8 bytes per parameter", "LoRA of attention and experts, r=8"


@pytest.mark.parametrize(
    "method", [pytest.param(one, marks=pytest.mark.slow if one in LONG else ()) for one in METHODS]
)
def test_what_fits_where_is_what_the_planner_says(method: str) -> None:
    assert section(method) in PAGE.read_text(), "python -m benchmarks.resources writes it"


def test_what_is_bold_was_measured() -> None:
    records = "".join(path.read_text() for path in (ROOT / "benchmarks/results").glob("*.md"))
    for rate, gib in MEASURED.values():
        assert re.search(rf"\| {rate:,}\b.*\| {gib}\b", records)


def test_pages_that_are_named_in_files_exist() -> None:
    """In messages, comments, recipes and the README. (Links among pages are looked at by docs/_ext/check.py.)"""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    for room in ("lightning_ep", "lightning_ep_start", "recipes", "benchmarks", "tests"):
        files += [path for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".yaml", ".sh")]
    for path in files:
        for page in re.findall(r"\bdocs/[\w/]+\.md\b", path.read_text()):
            assert (ROOT / page).exists(), f"{path.relative_to(ROOT)} names {page}"


def test_the_keys_that_users_of_others_are_told_exist() -> None:
    values = {
        "model.model": "tiny",
        "model.lr_scheduler.shape": "cosine",
        "model.adapter.target_modules": "[q_proj]",
        "model.adapter.pretrained": "adapter",
        "model.router": "null",
        "data.source": "a.jsonl",
        "data.validation_source": "b.jsonl",
        "data.chat_template": "plain",
        "data.template_kwargs.enable_thinking": "false",
        "data.too_long": "drop",
        "trainer.precision": "bf16-mixed",
        "trainer.strategy.activation_checkpointing": "full",
    }
    page = (ROOT / "docs/coming_from/trainers.md").read_text()
    keys = sorted(set(re.findall(r"`((?:trainer|model|data)\.[\w.]+)`", page)))
    assert len(keys) > 25
    given = " ".join(f"--{key} {values.get(key, '1')}" for key in keys)
    assert not (wrong := why_not(f"lightning-ep fit --config qwen3_30b_a3b_lora {given}")), wrong
