"""`lightning-ep prepare` and `lightning-ep preview`: the data of a recipe on CPUs alone, before and without a run."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from lightning_ep import cli, data
from lightning_ep.cli.recipe_data import data_ranks
from lightning_ep.data import preparation
from tests.data.chat_families import family_tokenizer
from tests.reference import tiny_config
from tests.tiny import SMALL


@pytest.fixture(autouse=True)
def _in_an_empty_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-ep"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    monkeypatch.setenv("NO_COLOR", "")


def chats(number: int, answer: str = "It is {}.") -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"How much is {i} + {i}?"},
                {"role": "assistant", "content": answer.format(2 * i)},
            ]
        }
        for i in range(number)
    ]


def write_rows(name: str, rows: list[Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def recipe(kind: str = "ChatDataModule", **data: Any) -> str:
    """A recipe for GPUs with a tiny model, which this machine could not run."""
    tokenizer = family_tokenizer("qwen3")
    tokenizer.save_pretrained("tokenizer")
    config = tiny_config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **SMALL)
    defaults = {"tokenizer": "tokenizer", "cache_dir": "cache", "sequence_length": 64, "num_proc": 1}
    content = {
        "trainer": {
            "accelerator": "gpu",
            "devices": 2,
            "strategy": {"class_path": "lightning_ep.ExpertParallelStrategy", "init_args": {"ep": 2}},
            "max_epochs": 1,
            "accumulate_grad_batches": 2,
            "callbacks": [{"class_path": "lightning_ep.callbacks.Throughput"}],
        },
        "model": {
            "class_path": "lightning_ep.CausalLM",
            "init_args": {"pretrained": False, "model": {**config.to_dict(), "model_type": config.model_type}},
        },
        "data": {"class_path": f"lightning_ep.data.{kind}", "init_args": defaults | data},
        "ckpt_path": None,
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(content, default=str))))
    return "recipe.yaml"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    cli.main(list(words))
    shown = capsys.readouterr()
    return shown.out + shown.err


def exit_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit):
        cli.main(list(words))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-ep: error")]
    return line


def test_prepare_needs_no_trainer_and_fit_finds_what_it_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = recipe(source=write_rows("chats.jsonl", chats(60)), validation_fraction=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(cli.training.CLI, "instantiate_trainer", None)
        with caplog.at_level(logging.INFO):
            shown = run(capsys, "prepare", path, "--data.num_proc", "2") + caplog.text
    (directory,) = Path("cache").iterdir()
    counts = json.loads((directory / "train" / preparation.COUNTS).read_text())
    assert counts["documents"] == 48
    assert f"prepared in {directory}" in shown
    for what in (
        "ChatDataModule, train: 48 documents",
        f"({counts['tokens']:,} tokens) in {counts['windows']} windows of 64",
        f"{counts['fill_rate']:.1%} full",
        f"{counts['supervised_share']:.1%} of the tokens are supervised",
        "ChatDataModule, val: 12 documents",
        f"{-(-(counts['windows'] // 2) // 2)} steps an epoch, each of 2 data ranks x 1 windows x 2 batches",
    ):
        assert what in shown
    # the same on the machine with the devices, here without them
    monkeypatch.setattr(preparation, "made_of", None)
    monkeypatch.setattr(data.packed_data, "prepare", None)
    alone = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy.ep", "1"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false", "--trainer.callbacks=null"]
    cli.main(["fit", "--config", path, *alone, *quiet, "--trainer.limit_train_batches", "1"])
    assert list(Path("cache").iterdir()) == [directory]


def test_prepare_says_what_would_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(source=write_rows("chats.jsonl", chats(9)))
    assert "ep=3" in exit_line(capsys, "prepare", path, "--trainer.strategy.ep", "3")
    assert not Path("cache").exists()
    assert "2 data ranks with batch_size=5 need at least 10" in exit_line(
        capsys, "prepare", path, "--data.batch_size", "5"
    )
    assert "there is no option 'nothing'" in exit_line(capsys, "prepare", path, "--data.nothing", "1")
    assert "chats.jsonl:10" in exit_line(
        capsys, "prepare", recipe(source=write_rows("chats.jsonl", [*chats(9), {"messages": 1}]))
    )


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ({}, 8),
        ({"devices": "8"}, 8),
        ({"devices": "0,1,2,3"}, 8),
        ({"devices": [0, 1]}, 4),
        ({"devices": "auto"}, None),
        ({"devices": -1}, None),
        ({"devices": "auto", "accelerator": "cpu", "sizes": {}}, 2),
        ({"strategy": "ep"}, 8),
        ({"strategy": Namespace(class_path="lightning.pytorch.strategies.DDPStrategy", init_args=Namespace())}, 8),
        ({"sizes": {"ep": 4, "tp": 2}}, 4),
        ({"sizes": {"ep": 8, "cp": 4}}, 2),
    ],
)
def test_data_ranks_are_those_of_the_layout(words: dict[str, Any], ranks: int | None) -> None:
    sizes = words.pop("sizes", {"ep": 4})
    ours = Namespace(class_path="lightning_ep.ExpertParallelStrategy", init_args=Namespace(**sizes))
    trainer = Namespace(**{"devices": 4, "num_nodes": 2, "accelerator": "gpu", "strategy": ours, **words})
    if words.get("devices") == "8":
        ranks = 16
    assert data_ranks(trainer) == ranks


def test_preview_shows_what_is_learnt_and_counts_sources(capsys: pytest.CaptureFixture[str]) -> None:
    sums = write_rows("sums.jsonl", chats(30))
    words = write_rows("words.jsonl", [*chats(20, "Half of {} words."), *chats(2, "very " * 80)])
    source = json.dumps([{"path": sums, "name": "sums"}, words])
    path = recipe(source=[], too_long="drop", template_kwargs={"enable_thinking": False})
    shown = run(capsys, "preview", path, "--data.source", source)
    assert not Path("cache").exists()
    heads = [line for line in shown.splitlines() if line.startswith("── ")]
    assert len(heads) == 5
    assert {head.split(":")[0] for head in heads} == {"── sums.jsonl", "── words.jsonl"}
    texts = shown.split("── ")[1:]
    for text in texts[:5]:
        number = int(text.split(":")[1]) - 1
        answer = f"It is {2 * number}." if text.startswith("sums") else f"Half of {2 * number} words."
        assert f"How much is {number} + {number}?" in text
        assert f"⟦{answer}<|im_end|>⟧" in text
    assert "sums: 30 rows, 30 documents" in shown
    assert "words.jsonl: 22 rows, 20 documents" in shown
    assert "left out: 2 longer than 64 tokens" in shown
    assert "Counted are the first rows of each source" in shown


def test_preview_reads_no_further_than_it_looks(capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows("chats.jsonl", chats(300))
    with open(path, "a") as file:
        file.seek(20 * 2**30)  # a hole: it takes no room, and minutes to read
        file.write("no JSON\n")
    began = time.monotonic()
    shown = run(capsys, "preview", recipe(source=path))
    assert "200 rows, 200 documents" in shown
    assert time.monotonic() - began < 10


def test_what_is_learnt_is_green_on_a_terminal_unless_no_colour_is_wished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(source=write_rows("chats.jsonl", chats(9)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "\x1b[32mIt is" in run(capsys, "preview", path)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in run(capsys, "preview", path)


def test_preview_of_texts_makes_a_tokenizer_of_what_it_looks_at(capsys: pytest.CaptureFixture[str]) -> None:
    Path("texts").mkdir()
    for number in range(3):
        Path("texts", f"{number}.txt").write_text(f"text {number}: " + "alpha beta gamma für \x1b[2J" * (4 + number))
    path = recipe("TextDataModule", source="texts", tokenizer=None, vocab_size=300, sequence_length=64)
    shown = run(capsys, "preview", path)
    assert "The tokenizer of this preview was made of these rows alone" in shown
    assert "alpha beta gamma für ␛[2J" in shown
    assert "texts: 3 rows" in shown
    assert not Path("cache").exists()


def test_of_a_stream_only_the_beginning_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows("texts.jsonl", [{"body": f"alpha {i}"} for i in range(300)])
    path = recipe("TextStreamDataModule", source=source, column="body")
    shown = run(capsys, "preview", path)
    assert "── texts.jsonl, row " in shown
    assert "texts.jsonl: 200 rows, 200 documents" in shown
    assert "read as a stream: max_steps says how many steps there are" in run(capsys, "prepare", path)


def test_the_page_shows_what_the_commands_print(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    asked = [("How warm is it in Oslo?", "7 degrees."), ("And in Rome?", "19 degrees.")]
    first = [{"role": "system", "content": "Be brief."}]
    for question, answer in asked:
        first += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    mine = write_rows("my_chats.jsonl", [{"messages": first}, *chats(400)])
    sums = {"path": write_rows("sums.jsonl", chats(90, "{} it is.")), "name": "sums"}
    path = recipe(source=[mine, sums], template_kwargs={"enable_thinking": False}, too_long="drop")
    page = (Path(__file__).parents[2] / "docs" / "operate" / "data.md").read_text()
    for command in ("preview", "prepare"):
        with caplog.at_level(logging.INFO):
            shown = run(capsys, command, path) + caplog.text
        (block,) = re.findall(rf"```\n\$ lightning-ep {command} chats.yaml\n(.*?)```", page, re.S)
        lines = [line for line in block.splitlines() if line != "..."]
        assert len(lines) > 3
        missing = [line for line in lines if line not in shown and not line.startswith("prepared in")]
        assert not missing


def test_preview_refuses_what_has_no_documents(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tests.cli.test_cli.TinyModule", "--data", "tests.cli.test_cli.TinyData"]
    assert "TinyData does not say how rows become documents" in exit_line(capsys, "preview", *words)
    assert "no data module" in exit_line(capsys, "prepare", *words[:2])
    assert "TinyData has prepared its data" in run(capsys, "prepare", *words)


def test_help_of_both_needs_no_torch() -> None:
    program = "import sys; from lightning_ep_start import main; main(sys.argv[1:])"
    for words, said in (
        (["--help"], "prepare      Prepare a recipe's data on CPUs"),
        (["prepare", "--help"], "usage: lightning-ep prepare CONFIG"),
        (["preview", "--help"], "lightning-ep preview quickstart"),
        (["preview"], "preview needs a YAML file or the name of a recipe (chats_quickstart"),
        (["preview", "quickstar"], "(did you mean quickstart?)"),
    ):
        command = [sys.executable, "-X", "importtime", "-c", program, *words]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert said in ran.stdout + ran.stderr
        assert "torch" not in {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if "|" in line}
