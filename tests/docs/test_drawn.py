"""Pictures that a program draws are those of today; pages and keys that are named exist."""

from __future__ import annotations

import re

from tests.docs.command_lines import why_not
from tests.docs.pages import ROOT, extension


def test_pictures_are_those_that_the_script_draws() -> None:
    for path, content in extension("pictures").files().items():
        assert path.read_text() == content, "python docs/_ext/pictures.py draws it"


def test_the_curves_are_those_of_the_record() -> None:
    curves = extension("curves")
    assert len(curves.curves()) == 9
    assert curves.description() in curves.PICTURE.read_text(), "python docs/_ext/curves.py draws it"
    assert f"({curves.PICTURE.name})" in (ROOT / "docs/operate/training.md").read_text()


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
