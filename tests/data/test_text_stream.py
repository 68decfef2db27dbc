"""Texts that are packed as they are read: in an order that does not change, resumed exactly, equally on all ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from lightning_ep import ExpertParallelStrategy
from lightning_ep.data import TextStreamDataModule, packed_stream, text_stream
from tests.data.loopback_hub import REPOSITORY, loopback_hub
from tests.data.test_packed_data import Recorder, sentences, tokenizer
from tests.ranks import run_ranks
from tests.tiny import quiet

__all__ = ["tokenizer"]  # a fixture

ROWS = 300


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    _use_small_buffers(monkeypatch.setattr)


def _use_small_buffers(set_to: Any) -> None:
    set_to(packed_stream, "BUFFER", 5)
    set_to(packed_stream, "_ROWS", 7)


def write(directory: Path, files: int, rows: int = ROWS) -> str:
    """JSON lines whose rows say their number; one has no text."""
    directory.mkdir(exist_ok=True)
    texts: list[str | None] = [f"row{index} {text}" for index, text in enumerate(sentences(rows))]
    texts[11] = None
    for file in range(files):
        lines = [json.dumps({"body": text, "other": file}) for text in texts[file::files]]
        (directory / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    return str(directory)


def stream(source: str, tokenizer: str, root: Path, **settings: Any) -> TextStreamDataModule:
    defaults = {"sequence_length": 64, "batch_size": 2, "column": "body", "num_workers": 0, "num_proc": 1}
    data = TextStreamDataModule(source, tokenizer=tokenizer, cache_dir=str(root / "cache"), **{**defaults, **settings})
    data.prepare_data()
    data.setup("fit")
    return data


def texts_of(data: Any, batches: Any) -> list[list[str]]:
    """The documents of each window, as positions tell them apart."""
    found = []
    for batch in batches:
        for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
            begins = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            texts = []
            for begin, end in pairwise(begins):
                if (labels[begin:end] != -100).any():
                    assert labels[begin:end].tolist() == [-100, *ids[begin + 1 : end].tolist()]
                    texts.append(data.tokenizer.decode(ids[begin:end]))
            found.append(texts)
    return found


def epoch_of(texts: list[list[str]]) -> list[str]:
    flat = [text for window in texts for text in window]
    return flat[: next((i for i, text in enumerate(flat) if flat.index(text) != i), len(flat))]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_text_comes_once_an_epoch_whole_and_mixed(num_workers: int, tokenizer: str, tmp_path: Path) -> None:
    data = stream(write(tmp_path / "texts", 3), tokenizer, tmp_path, num_workers=num_workers)
    windows = texts_of(data, islice(data.train_dataloader(), 60))
    once = epoch_of(windows)
    expected = [f"row{i} {text}<|endoftext|>" for i, text in enumerate(sentences(ROWS)) if i != 11]
    assert sorted(once) == sorted(expected)
    numbers = [int(text.split()[0][3:]) for text in once]
    assert numbers != sorted(numbers)
    assert len([text for window in windows for text in window]) > len(once), "the stream must begin anew"
    again = stream(str(tmp_path / "texts"), tokenizer, tmp_path)
    assert texts_of(again, islice(again.train_dataloader(), 60)) == windows
    other = stream(str(tmp_path / "texts"), tokenizer, tmp_path, seed=1)
    assert texts_of(other, islice(other.train_dataloader(), 60)) != windows


def test_long_texts_are_cut_and_windows_are_full(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "long").mkdir()
    for name in "ab":
        (tmp_path / "long" / f"{name}.txt").write_text(f"{name} " + " ".join(sentences(200)))
    data = stream(str(tmp_path / "long"), tokenizer, tmp_path, column="text")
    windows = texts_of(data, islice(data.train_dataloader(), 20))
    ids = [data.tokenizer((tmp_path / "long" / f"{name}.txt").read_text())["input_ids"] for name in "ab"]
    pieces = [data.tokenizer.decode(i[b : b + 64]) for i in ids for b in range(0, len(i) - 1, 64)]
    assert set(epoch_of(windows)[:10]) <= {*pieces, *(piece + "<|endoftext|>" for piece in pieces)}


@pytest.mark.parametrize(("kind", "files"), [("jsonl", 1), ("jsonl", 4), ("parquet", 3), ("saved", 1)])
def test_a_run_goes_on_at_any_batch(kind: str, files: int, tokenizer: str, tmp_path: Path) -> None:
    source = write(tmp_path / "texts", files)
    if kind != "jsonl":
        rows = [json.loads(line) for path in sorted(Path(source).iterdir()) for line in path.read_text().splitlines()]
        source = str(tmp_path / "others" if kind == "parquet" else tmp_path / "saved")
        if kind == "parquet":
            Path(source).mkdir()
            for file in range(files):
                Dataset.from_list(rows[file::files]).to_parquet(f"{source}/{file}.parquet", batch_size=20)
        else:
            DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(source)
    data = stream(source, tokenizer, tmp_path, batch_size=3)
    whole = texts_of(data, islice(data.train_dataloader(), 45))
    states = []
    loader = data.train_dataloader()
    for _ in islice(loader, 40):  # into the second epoch
        states.append(loader.state_dict())
    for done in (1, 2, 17, 39):
        resumed = data.train_dataloader()
        resumed.load_state_dict(states[done - 1])
        left = texts_of(data, islice(resumed, 45 - done))
        assert left == whole[3 * done :], done


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def _fit(source: str, tokenizer: str, root: Path, resume: str | None = None, **settings: Any) -> Recorder:
    _use_small_buffers(setattr)
    data = TextStreamDataModule(
        source,
        f"{source}/0.jsonl",
        column="body",
        tokenizer=tokenizer,
        cache_dir=str(root / "cache"),
        sequence_length=64,
        batch_size=1,
        num_proc=1,
        malformed="skip",
    )
    module = Recorder()
    trainer = quiet(root, **{"strategy": ExpertParallelStrategy(ep=2), "max_steps": 6, **settings})
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    assert "val/loss" in trainer.callback_metrics, "validation comes at the end of the run"
    return module


def _fit_and_resume(source: str, tokenizer: str, root: Path) -> tuple[Any, ...]:
    whole = _fit(source, tokenizer, root, callbacks=[SaveAt(3, root / "mid.ckpt")])
    rest = _fit(source, tokenizer, root, str(root / "mid.ckpt"))
    return whole.seen, whole.rates, rest.seen, rest.rates


@pytest.mark.parametrize("files", [2, 3])  # each rank its own file, or each every second row of all
def test_ranks_read_shares_take_equal_steps_and_resume(files: int, tokenizer: str, tmp_path: Path) -> None:
    source = write(tmp_path / "texts", files, 80 * files)
    ranks = run_ranks(2, _fit_and_resume, source, tokenizer, tmp_path, init_process_group=False)
    for seen, rates, rest, rest_rates in ranks:
        assert len(seen) == 6
        assert rest == seen[3:]
        assert rates == pytest.approx([1 - step / 6 for step in range(6)])
        assert rest_rates == pytest.approx(rates[3:])
    words = corpus_tokenizer(tokenizer)
    numbers = [{word for ids in seen for word in words.decode(ids).split() if word[:3] == "row"} for seen, *_ in ranks]
    assert min(map(len, numbers)) > 5
    assert not numbers[0] & numbers[1]


def corpus_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def test_a_dataset_of_the_hub_is_read_as_a_stream(tmp_path: Path) -> None:
    program = f"""if True:
        from lightning_ep.data import Source
        from lightning_ep.data.text_stream import open_stream

        print([row["body"] for row in open_stream(Source("{REPOSITORY}"), "body")])
    """
    rows = "".join(json.dumps({"body": text}) + "\n" for text in sentences(3))
    with loopback_hub({"train.jsonl": rows.encode()}) as address:
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", program]
        ran = subprocess.run(command, env=os.environ | hub, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == str(sentences(3))


def test_what_cannot_work_is_said_at_the_start(tokenizer: str, tmp_path: Path) -> None:
    source = write(tmp_path / "texts", 1)

    def fit(path: str = source, max_steps: int = 2, **settings: Any) -> None:
        data = TextStreamDataModule(
            path, tokenizer=tokenizer, cache_dir=str(tmp_path), sequence_length=64, **{"column": "body", **settings}
        )
        trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1), max_steps=max_steps, max_epochs=1)
        trainer.fit(Recorder(), datamodule=data)

    with pytest.raises(ValueError, match=r"which has no end: say how many steps there are, with max_steps"):
        fit(max_steps=-1)
    with pytest.raises(ValueError, match=r"the column 'text' must be a text, and the row has .*'body': 'str'"):
        fit(column="text")
    with pytest.raises(FileNotFoundError, match=r"There is no .*nowhere/\*.jsonl with files that end with .jsonl"):
        fit(str(tmp_path / "nowhere" / "*.jsonl"))
    (tmp_path / "texts" / "more.txt").write_text("a text")
    with pytest.raises(ValueError, match=r"has files that end with .jsonl, .txt; a stream reads files of one kind"):
        fit()
    with pytest.raises(ValueError, match=r"num_workers=2: a stream is read by one process"):
        fit(num_workers=2)
    (tmp_path / "empty.jsonl").write_text('{"body": ""}\n')
    with pytest.raises(ValueError, match=r"No row of this rank's share of the stream has a text"):
        fit(str(tmp_path / "empty.jsonl"), num_workers=0)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty.jsonl' has no rows"):
        fit(str(tmp_path / "empty.jsonl"))


def test_a_stream_may_begin_with_a_row_without_a_text(tokenizer: str, tmp_path: Path) -> None:
    rows = [{"body": None}, *({"body": text} for text in sentences(20))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"tokenizer": tokenizer, "column": "body", "sequence_length": 64, "num_workers": 0}
    data = TextStreamDataModule(str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path), **settings)
    trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1), max_steps=1, max_epochs=1)
    trainer.fit(Recorder(), datamodule=data)
    assert trainer.global_step == 1


def write_uneven(directory: Path, files: int) -> str:
    """JSON lines as `write` has them, but with more columns in later files, and a line in the middle of each broken."""
    source = write(directory, files, 120)
    for number, file in enumerate(sorted(directory.iterdir())):
        rows = [{**json.loads(line), **{f"new{i}": {"a": i} for i in range(number)}} for line in file.open()]
        lines = [json.dumps(row) for row in rows]
        lines.insert(len(lines) // 2, '{"body": "cut')
        file.write_text("\n".join(lines) + "\n")
    return source


TOLD = r"\d\.jsonl:\d+: the line is no JSON: Unterminated string .* of this file that cannot be read"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_uneven_files_with_broken_lines_are_read_and_resumed(
    num_workers: int, tokenizer: str, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest keeps warnings, those of the other process in that process.
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: print(message, file=sys.stderr, flush=True))
    data = stream(write_uneven(tmp_path / "texts", 2), tokenizer, tmp_path, num_workers=num_workers)
    loader, windows, states = data.train_dataloader(), [], []
    for batch in islice(loader, 25):
        windows += texts_of(data, [batch])
        states.append(loader.state_dict())
    expected = [f"row{i} {text}<|endoftext|>" for i, text in enumerate(sentences(120)) if i != 11]
    assert sorted(epoch_of(windows)) == sorted(expected)
    assert len([text for window in windows for text in window]) > len(expected), "the stream must begin anew"
    # Once for each file.
    assert [line[:10] for line in re.findall(TOLD, capfd.readouterr().err)] == ["0.jsonl:31", "1.jsonl:31"]
    for done in (1, 8, 24):
        resumed = data.train_dataloader()
        resumed.load_state_dict(states[done - 1])
        assert texts_of(data, islice(resumed, 25 - done)) == windows[2 * done :], done


@pytest.mark.parametrize("files", [2, 3])  # each rank its own file, or each every second row of all
def test_of_two_ranks_one_has_a_row_and_one_tells_of_it(
    files: int, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: Any
) -> None:
    source, read = write_uneven(tmp_path / "texts", files), []
    for rank in range(2):
        monkeypatch.setattr(text_stream, "data_ranks", lambda _, rank=rank: (rank, 2))
        data = stream(source, tokenizer, tmp_path)
        read.append(epoch_of(texts_of(data, islice(data.train_dataloader(), 25))))
    expected = [f"row{i} {text}<|endoftext|>" for i, text in enumerate(sentences(120)) if i != 11]
    assert sorted(read[0] + read[1]) == sorted(expected)
    assert abs(len(read[0]) - len(read[1])) <= 2
    told = re.findall(TOLD, "\n".join(str(warning.message) for warning in recwarn))
    assert sorted(line[0] for line in told) == [str(file) for file in range(files)]


def test_files_that_cannot_be_read_are_refused_at_the_start(tokenizer: str, tmp_path: Path) -> None:
    def fit(source: Path) -> None:
        settings: dict[str, Any] = {"tokenizer": tokenizer, "column": "body", "sequence_length": 64, "num_workers": 0}
        data = TextStreamDataModule(str(source), cache_dir=str(tmp_path / "cache"), **settings)
        quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1), max_steps=1, max_epochs=1).fit(
            Recorder(), datamodule=data
        )

    (tmp_path / "parquet").mkdir()
    Dataset.from_list([{"body": text} for text in sentences(50)]).to_parquet(str(tmp_path / "parquet" / "a.parquet"))
    cut = (tmp_path / "parquet" / "a.parquet").read_bytes()[:-9]
    (tmp_path / "parquet" / "b.parquet").write_bytes(cut)
    with pytest.raises(ValueError, match=r"b.parquet is no parquet, or not whole"):
        fit(tmp_path / "parquet")
    (tmp_path / "utf16.jsonl").write_text('{"body": "a text"}\n' * 3, encoding="utf-16")
    with pytest.raises(ValueError, match=r"no row that can be read\. .*utf16.jsonl:1: the line is no JSON: 'utf-8'"):
        fit(tmp_path / "utf16.jsonl")
    (tmp_path / "late.jsonl").write_text('broken\n{"content": "a text", "body": 3}\n')
    with pytest.raises(ValueError, match=r"late.jsonl:2: the column 'body' must .*'content': 'str', 'body': 'int'"):
        fit(tmp_path / "late.jsonl")


def test_the_recipe_of_the_page_reads_a_stream(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operate" / "data.md").read_text()
    (block,) = re.findall(r"```yaml\n(trainer: .*?)```", page, re.S)
    parser = ArgumentParser()
    parser.add_subclass_arguments(TextStreamDataModule, "data")
    parser.add_argument("--trainer.max_steps", type=int)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    Dataset.from_list([{"text": text} for text in sentences(400)]).to_parquet(str(tmp_path / "corpus" / "0.parquet"))
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"text": "alpha beta " * 9}) + "\n")
    data = parser.instantiate(parser.parse_string(block)).data
    data._tokenizer_source, data.cache_dir, data.sequence_length, data.num_proc = tokenizer, str(tmp_path), 64, 1
    module, trainer = Recorder(), quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1), max_steps=2)
    trainer.fit(module, datamodule=data)
    assert len(module.seen) == 4
    assert "val/loss" in trainer.callback_metrics


def test_a_position_is_of_its_data(tokenizer: str, tmp_path: Path) -> None:
    source = write(tmp_path / "texts", 1)
    loader = stream(source, tokenizer, tmp_path).train_dataloader()
    next(iter(loader))
    other = stream(source, tokenizer, tmp_path, seed=3).train_dataloader()
    with pytest.raises(ValueError, match=r"stops inside a stream of .*'seed': 0.*this run reads .*'seed': 3"):
        other.load_state_dict(loader.state_dict())
