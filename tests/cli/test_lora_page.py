"""docs/start/lora.md does what it says, line by line, on a tiny model in the place of the one that it names."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ep import cli
from tests.ranks import run_ranks
from tests.talking import on_two_ranks, write_talking

PAGE = (Path(__file__).parents[2] / "docs" / "start" / "lora.md").read_text()
SMALLER = {
    "Qwen/Qwen3-30B-A3B": "tiny",
    "compile: true": "compile: false",
    r"sequence_length: \d+": "sequence_length: 64",
    "max_epochs: 1": "max_epochs: 1\n  accelerator: auto\n  devices: 1\n  logger: false",
}


def _blocks(section: str, language: str) -> list[str]:
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def _prepare(section: str, name: str, rows: str) -> list[str]:
    """Writes the files of a section, smaller, and returns its commands."""
    (row,), (recipe,), (commands,) = (_blocks(section, language) for language in ("json", "yaml", "bash"))
    Path(rows).write_text("".join(json.dumps(json.loads(row)) + "\n" for _ in range(40)))
    for what, smaller in SMALLER.items():
        recipe, found = re.subn(what, smaller, recipe)
        assert found == 1 or what.startswith("Qwen"), what
    Path(name).write_text(recipe)
    return commands.splitlines()


def _said(words: list[str], root: Path | None = None) -> str:
    if root is not None:
        os.chdir(root)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main(words)
    return printed.getvalue()


def _run(root: Path, commands: list[str]) -> dict[str, str]:
    """What each command prints; those with a Trainer in a process of their own."""
    printed = {}
    for line in commands:
        _, *words = shlex.split(line, comments=True)
        if words[0] in ("fit", "validate"):
            (said,) = run_ranks(1, _said, words, root, init_process_group=False)
        else:
            said = _said(words)
        printed[" ".join(words[:2])] = said
    return printed


@on_two_ranks
@pytest.mark.usefixtures("on_the_tests_device")
def test_the_page_goes_from_chats_to_answers_and_on_to_preferences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_talking(tmp_path / "tiny")
    said = _run(tmp_path, _prepare("From chats to answers", "lora.yaml", "my_chats.jsonl"))
    answers = [text for command, text in said.items() if command.startswith("generate")]
    assert len(answers) == 3
    assert len(set(answers)) == 1, "run, adapter and merged model say the same"
    assert "val/loss" in said["validate --config"]
    assert AutoTokenizer.from_pretrained(tmp_path / "exports/my-adapter").chat_template
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path / "exports/my-model"), "peft_config")
    said = _run(tmp_path, _prepare("Preferences", "dpo.yaml", "my_pairs.jsonl"))
    assert said["generate exports/my-preferences"]
    assert "exports/my-model" in (tmp_path / "exports/my-preferences/adapter_config.json").read_text()
