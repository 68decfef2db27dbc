"""A model learns to answer: trained on text, exported, fine-tuned on chats by a recipe, exported, asked by others.

`.ci/run` runs this alone, in a step of its own: it trains in earnest. The others are plain transformers, the server of
`transformers serve` over HTTP, and `lm_eval` where it is installed (`pip install -e ".[judges]"`).
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ep.data.examples import DocstringChats
from lightning_ep.data.template_text import template_text
from tests.ranks import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(540)]

FORM = re.compile(r"In short: [A-Z][^\n]*\.")
QUESTIONS = 64
LONGEST = 48
"""Tokens of an answer; what is longer has not ended."""


class Run(NamedTuple):
    base: Path  # trained on text
    tuned: Path  # and then on chats
    questions: list[str]  # of which it has seen none
    trained_on: str


def _fit(folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "lightning_ep", "fit", *options, "--trainer.enable_progress_bar", "false"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "LIGHTNING_EP_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The two trainings, each with ep=2 on two processes, from the command line."""
    folder = tmp_path_factory.mktemp("real")
    _fit(
        folder, "--config", "quickstart", "--trainer.max_steps", "60", "--trainer.limit_val_batches", "4",
        "--trainer.callbacks+=lightning_ep.callbacks.HuggingFaceExport", "--trainer.callbacks.path", "base",
    )  # fmt: skip
    _fit(
        folder, "--config", "sft_quickstart", "--trainer.max_epochs", "1",
        "--model.init_args.pretrained", "true", "--model.init_args.model", "base",
    )  # fmt: skip
    chats = DocstringChats(
        chat_template="plain", sequence_length=256, validation_fraction=0.05, cache_dir=str(folder / "cache"),
        tokenizer=str(folder / "base"),
    )  # fmt: skip
    (rows,) = chats.sources()
    _, held_out = chats.split(rows)
    spread = held_out[:: len(held_out) // QUESTIONS][:QUESTIONS].tolist()  # over the modules of the library
    questions = [row.columns()["messages"][0]["content"] for row in rows.read(spread)]
    chats.prepare_data()  # as the recipe has it, in its cache
    chats.setup()
    seen = "".join(chats.tokenizer.batch_decode([window["input_ids"] for window in chats.train_dataset]))
    return Run(folder / "base", folder / "exports" / "sft_quickstart", questions, seen)


def _answers(path: Path, questions: list[str]) -> list[str]:
    """What plain transformers make of the questions, all at once; "" where no answer has ended."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    template = tokenizer.chat_template or template_text("plain")  # a base model has none
    tokenizer.padding_side = "left"
    inputs: Any = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        chat_template=template, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    end = model.generation_config.eos_token_id
    assert end is not None
    return [tokenizer.decode(row, skip_special_tokens=True) if end in row.tolist() else "" for row in ids]


def test_the_form_of_answers_is_learnt_and_holds_for_questions_that_were_never_seen(run: Run) -> None:
    assert len(set(run.questions)) == QUESTIONS
    assert "What does the method" in run.trained_on
    assert not [question for question in run.questions if question in run.trained_on]
    before, after = (_answers(path, run.questions) for path in (run.base, run.tuned))
    assert not [answer for answer in before if FORM.fullmatch(answer)]
    well = [answer for answer in after if FORM.fullmatch(answer)]
    assert len(well) >= 0.9 * QUESTIONS, after
    assert len(set(well)) > 5, "they are answers to questions, and not one phrase"


# ------------------------------------------------------------------------------------------------------ outside judges


@contextmanager
def _served(path: Path, log: Path) -> Iterator[str]:
    """The address of a server of the model, on the CPU."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = shutil.which("transformers", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program is not None
    command = [program, "serve", str(path), "--device", "cpu", "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://localhost:{port}"
    try:
        while not _is_up(address):
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)  # the test's time-out ends it
        yield address
    finally:
        server.terminate()
        server.wait(30)


def _is_up(address: str) -> bool:
    try:
        return requests.get(f"{address}/health", timeout=5).ok
    except requests.ConnectionError:
        return False


def test_chats_of_ones_own_go_on_from_it(run: Run) -> None:
    """The second command of docs/start/chats.md for a CPU, on chats whose answers have another form."""
    folder = run.base.parent
    pairs = {f"What comes after {number}?": f"Answer: {number + 1}." for number in range(100, 300)}
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs.items()]
    (folder / "my_chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    _fit(folder, "--config", "chats_quickstart", "--data.source", "my_chats.jsonl")
    answers = _answers(folder / "exports" / "my_chats", list(pairs)[::5])
    assert sum(re.fullmatch(r"Answer: \d+\.", answer) is not None for answer in answers) >= 36, answers
    with (folder / "runs" / "chats_quickstart" / "version_0" / "metrics.csv").open() as file:
        graded = [row["val/exact_match"] for row in csv.DictReader(file) if row.get("val/exact_match")]
    assert len(graded) == 3, "30 epochs, of which every tenth is validated"


def test_transformers_serve_answers_over_http_what_transformers_answers(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    expected = _answers(run.tuned, run.questions[:1])[0]
    with _served(run.tuned, log) as address:
        messages = [{"role": "user", "content": run.questions[0]}]
        body = {"model": str(run.tuned), "messages": messages, "max_tokens": LONGEST}
        reply = requests.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    assert reply.ok, log.read_text()
    (choice,) = reply.json()["choices"]
    assert choice["message"]["content"] == expected
    assert choice["finish_reason"] == "stop"
    assert FORM.fullmatch(expected)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason='a judge of its own extra: pip install -e ".[judges]"')
def test_lm_eval_runs_a_task_on_the_export(run: Run, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in run.questions))
    page = (REPOSITORY / "docs" / "start" / "chats.md").read_text()
    (task,) = re.findall(r"```yaml\n(task: .*?)```", page, re.S)
    (tmp_path / "answers_in_form.yaml").write_text(task)
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={run.tuned},dtype=float32",
        "--tasks", "answers_in_form", "--include_path", str(tmp_path), "--apply_chat_template", "--device", "cpu",
        "--batch_size", "16", "--output_path", "results",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (tmp_path / "results").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["answers_in_form"]["exact_match,form"]
    well = [answer for answer in _answers(run.tuned, run.questions) if FORM.fullmatch(answer)]
    assert found == pytest.approx(len(well) / QUESTIONS, abs=2 / QUESTIONS), "answers that do not end count there"
