"""first_run.md and lora.md of docs/start: what their commands print and leave behind."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ep import CausalLM
from lightning_ep_start import recipes
from tests.docs.pages import ROOT, block
from tests.reference import relative_error

PAGE = "docs/start/first_run.md"


def _run(root: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "LIGHTNING_EP_CACHE": str(root)}
    command = [sys.executable, "-m", "lightning_ep", *words]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_run_prints_what_the_page_shows(tmp_path: Path) -> None:
    few = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"]
    _, *words = block(PAGE, "lightning-ep fit --config quickstart\n").split()
    assert block(PAGE, "Training starts:") in _run(tmp_path, *words, *few)
    assert (tmp_path / "runs/quickstart/checkpoints/last.ckpt").is_dir()
    for name in ("metrics.csv", "config.yaml"):
        assert (tmp_path / "runs/quickstart/version_0" / name).is_file()


def test_recipes_are_shown_and_copied(tmp_path: Path) -> None:
    shown, copied, _ = block(PAGE, "lightning-ep recipes show").splitlines()
    text = recipes.files()["quickstart"].read_text()
    assert _run(tmp_path, *shown.split()[1:]) == text
    _run(tmp_path, *copied.split()[1:])
    assert (tmp_path / "quickstart.yaml").read_text() == text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_adapters_are_trained_with_an_eye_on_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of lora.md, with fewer steps and chats that it does not show."""
    rows = [[("user", f"What is {n}?"), ("assistant", f"It is {n}.")] for n in range(60)]
    chats = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in rows]
    (tmp_path / "my_chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    lines = block("docs/start/lora.md", "lightning-ep fit --config quickstart").replace("\\\n", " ").splitlines()
    base, adapters, asked, alone, merged, asked_again = (shlex.split(line)[1:] for line in lines)
    _run(tmp_path, *base, "--trainer.max_steps", "2", "--trainer.val_check_interval", "2")
    _run(tmp_path, *adapters, "--trainer.max_steps", "5", "--trainer.val_check_interval", "5")
    run = tmp_path / "runs/lora_quickstart/version_0"
    assert "routing/max_violation" in (run / "metrics.csv").read_text()
    assert list((run / "routing").glob("*.png"))
    few = ("--trainer.max_steps", "6", "--trainer.val_check_interval", "6", "--ckpt_path", "last")
    assert "Restored all states from the checkpoint" in _run(tmp_path, *adapters, *few)
    for name, line in zip(
        ("before", "after"), block("docs/start/lora.md", "lightning-ep routing").splitlines(), strict=True
    ):
        assert "least popular: layer " in _run(tmp_path, *shlex.split(line)[1:])
        assert (tmp_path / f"routing_{name}" / "expert_load.csv").is_file()
    line = block("docs/start/lora.md", "lightning-ep fit --config lora_quickstart").replace("\\\n", " ")
    _run(tmp_path, *shlex.split(line)[1:], "--trainer.max_steps", "5", "--trainer.val_check_interval", "5")
    assert "train/router_balance" in (run.with_name("version_2") / "metrics.csv").read_text()
    answer = _run(tmp_path, *asked, "--max_new_tokens", "4")
    _run(tmp_path, *merged)
    assert _run(tmp_path, *asked_again, "--max_new_tokens", "4").splitlines()[-1] == answer.splitlines()[-1] != ""
    _run(tmp_path, *alone)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block("docs/start/lora.md", "from peft import"), names)
    loaded = CausalLM.load_from_checkpoint("runs/lora_quickstart/checkpoints/last.ckpt").eval()
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        by_peft, ours = (model(input_ids=ids).logits for model in (names["model"], loaded))
        with names["model"].disable_adapter():
            base_alone = names["model"](input_ids=ids).logits
    assert relative_error(ours, by_peft) < 1e-5
    assert relative_error(base_alone, by_peft) > 1e-5, "the adapter must matter"
