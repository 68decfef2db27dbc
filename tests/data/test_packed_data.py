"""What data modules of packed documents share: preparation in processes, its cache, counts, validation, equal steps."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_ep import CausalLM, ExpertParallelStrategy, Schedule
from lightning_ep.data import PackedDataModule, Rows, Samples, corpus
from lightning_ep.data.preparation import COUNTS, WINDOWS, describe
from tests.ranks import run_ranks
from tests.reference import tiny_config
from tests.tiny import SMALL, quiet

END = "<|endoftext|>"


def sentences(number: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["alpha", "beta", "gamma", "delta", "für", "数"]
    return [f"{index} " + " ".join(rng.choice(words, rng.integers(1, 25))) for index in range(number)]


class Sentences(PackedDataModule):
    """Every word but the first three of a text is supervised; texts of less than four words are left out."""

    def __init__(self, texts: dict[str, list[str]], pids: Path | None = None, **settings: Any) -> None:
        defaults: dict[str, Any] = {"sequence_length": 64, "batch_size": 2, "validation_fraction": 0.2, "num_proc": 1}
        self.weights = settings.pop("weights", {})
        self.validation: dict[str, list[str]] | None = settings.pop("validation", None)
        self.stop = settings.pop("stop", ".")
        super().__init__(**(defaults | settings))
        self.texts, self.pids = texts, pids

    def sources(self) -> list[Rows]:
        return self._rows(self.texts)

    def validation_sources(self) -> list[Rows] | None:
        return None if self.validation is None else self._rows(self.validation)

    def settings(self) -> Sequence[object]:
        return [self.stop]

    def _rows(self, texts: dict[str, list[str]]) -> list[Rows]:
        return [
            Rows(
                name,
                len(rows),
                hashlib.sha256(repr(rows).encode()).hexdigest(),
                lambda indices, rows=rows: [rows[index] for index in indices],
                weight=self.weights.get(name, 1.0),
                rows_per_task=7,
            )
            for name, rows in texts.items()
        ]

    def make_samples(self, rows: Sequence[str], samples: Samples) -> None:
        if self.pids is not None:
            (self.pids / str(os.getpid())).touch()
        for text in rows:
            if "forbidden" in text:
                raise ValueError(f"row {text!r} is forbidden")
            if len(text.split()) < 4:
                samples.drop("of less than four words")
                continue
            encoded = self.tokenizer(text + self.stop, return_offsets_mapping=True)
            begin = len(" ".join(text.split()[:3]))
            samples.add(encoded["input_ids"], [start >= begin for start, _ in encoded["offset_mapping"]])
            samples.note("texts with a letter that is no ASCII", int("ü" in text))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    corpus.train_tokenizer(iter(sentences(50)), 300).save_pretrained(path)
    return str(path)


def prepared(data: PackedDataModule) -> PackedDataModule:
    data.prepare_data()
    data.setup("fit")
    return data


def documents(data: PackedDataModule, dataset: Any) -> list[tuple[str, str]]:
    """Text and supervised text of every document in some windows, as positions tell them apart."""
    found = []
    for window in dataset:
        ids, labels, positions = (window[name].tolist() for name in ("input_ids", "labels", "position_ids"))
        begins = [index for index, position in enumerate(positions) if position == 0] + [len(ids)]
        for begin, end in pairwise(begins):
            if not set(ids[begin:end]) <= {data.tokenizer.pad_token_id}:
                supervised = [id for id, label in zip(ids[begin:end], labels[begin:end], strict=True) if label != -100]
                assert all(label in (-100, id) for id, label in zip(ids[begin:end], labels[begin:end], strict=True))
                found.append((data.tokenizer.decode(ids[begin:end]), data.tokenizer.decode(supervised)))
    return found


def kept(texts: list[str]) -> list[str]:
    return [text for text in texts if len(text.split()) > 3]


def test_windows_hold_whole_texts_and_supervise_what_is_said(tokenizer: str, tmp_path: Path) -> None:
    texts = sentences(60)
    data = prepared(Sentences({"a": texts}, tokenizer=tokenizer, cache_dir=str(tmp_path)))
    train, val = documents(data, data.train_dataset), documents(data, data.val_dataset)
    assert sorted(text for text, _ in train + val) == sorted(text + "." for text in kept(texts))
    assert not {text for text, _ in train} & {text for text, _ in val}
    assert all(supervised.split() == text.split()[3:] for text, supervised in train + val)
    assert len(train) > 3 * len(val) > 0
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert list(batch) == ["input_ids", "labels", "position_ids"]
        assert {values.dtype for values in batch.values()} == {torch.int64}
        assert {values.shape for values in batch.values()} == {(2, 64)}


def test_windows_are_the_same_from_one_process_and_from_four(tokenizer: str, tmp_path: Path) -> None:
    texts, found = {"a": sentences(100), "b": sentences(33, seed=1)}, []
    for num_proc in (1, 4):
        pids, cache = tmp_path / f"pids{num_proc}", tmp_path / f"cache{num_proc}"
        pids.mkdir()
        Sentences(texts, pids, tokenizer=tokenizer, cache_dir=str(cache), num_proc=num_proc).prepare_data()
        (directory,) = cache.iterdir()
        files = [directory / part / name for part in ("train", "val") for name in (WINDOWS, COUNTS)]
        assert sorted(path for path in directory.rglob("*") if path.is_file()) == sorted(files)
        found.append((directory.name, [path.read_bytes() for path in files]))
        ran = {int(path.name) for path in pids.iterdir()}
        assert ran == {os.getpid()} if num_proc == 1 else os.getpid() not in ran and len(ran) > 1
    assert found[0] == found[1]


def test_counts_say_what_is_in_windows_and_what_was_left_out(tokenizer: str, tmp_path: Path, caplog) -> None:
    texts = ["one two three four für", "too short", "also short", " ".join(["alpha"] * 300), "one two three four"]
    data = Sentences({"a": texts * 4}, tokenizer=tokenizer, cache_dir=str(tmp_path), validation_fraction=0, stop="")
    with caplog.at_level(logging.INFO):
        prepared(data)
    (counts,) = data.counts.values()
    assert counts["dropped"] == {"of less than four words": 8, "longer than 64 tokens": 4}
    assert counts["notes"] == {"texts with a letter that is no ASCII": 4}
    assert counts["documents"] == 8
    assert counts["sources"]["a"]["rows"] == 20
    windows = [data.train_dataset[index] for index in range(len(data.train_dataset))]
    supervised = sum(int((window["labels"] != -100).sum()) for window in windows)
    lengths = [len(data.tokenizer(text)["input_ids"]) for text in (texts[0], texts[4])]
    assert counts["windows"] == len(windows)
    assert counts["tokens"] == 4 * sum(lengths)
    assert counts["supervised"] == supervised > 0
    assert counts["fill_rate"] == counts["tokens"] / (64 * len(windows))
    assert counts["supervised_share"] == supervised / counts["tokens"]
    (line,) = [record.getMessage() for record in caplog.records if "Sentences, train" in record.getMessage()]
    assert f"8 documents ({counts['tokens']} tokens) in {len(windows)} windows of 64, " in line
    assert f"{counts['fill_rate']:.1%} full" in line
    assert f"{counts['supervised_share']:.1%} of the tokens are supervised" in line
    assert "left out: 4 longer than 64 tokens, 8 of less than four words" in line
    assert "4 texts with a letter that is no ASCII" in line


def test_documents_without_supervised_tokens_are_left_out(tokenizer: str, tmp_path: Path) -> None:
    class FirstOnly(Sentences):
        def make_samples(self, rows: Sequence[str], samples: Samples) -> None:
            for text in rows:  # the first token is never predicted
                ids = self.tokenizer(text)["input_ids"]
                samples.add(ids, [index == 0 or text.startswith("7") for index in range(len(ids))])

    settings: dict[str, Any] = {"tokenizer": tokenizer, "cache_dir": str(tmp_path), "validation_fraction": 0}
    counts = prepared(FirstOnly({"a": sentences(30)}, batch_size=1, **settings)).counts["train"]
    assert (counts["documents"], counts["dropped"]) == (1, {"without supervised tokens": 29})


def test_cache_is_used_again_and_follows_rows_tokenizer_and_settings(tokenizer: str, tmp_path: Path) -> None:
    texts, pids = {"a": sentences(60)}, tmp_path / "pids"
    pids.mkdir()

    def prepares(texts: dict[str, list[str]] = texts, **settings: Any) -> bool:
        settings = {"tokenizer": tokenizer, "cache_dir": str(tmp_path / "cache"), **settings}
        prepared(Sentences(texts, pids, **settings))
        found = list(pids.iterdir())
        for path in found:
            path.unlink()
        return bool(found)

    assert prepares()
    assert not prepares()
    assert not prepares(batch_size=1, num_workers=1)
    assert prepares({"a": sentences(60, seed=1)})
    assert prepares({"b": sentences(60)})
    assert prepares(stop="!")
    assert prepares(sequence_length=65)
    assert prepares(seed=1)
    assert prepares(weights={"a": 2})
    assert prepares(validation={"a": sentences(9)})
    assert prepares(validation_fraction=0)
    other = tmp_path / "other"
    corpus.train_tokenizer(iter(sentences(50, seed=9)), 290).save_pretrained(other)
    assert prepares(tokenizer=str(other))
    assert not prepares()


def test_sources_come_as_often_as_their_weights_say(tokenizer: str, tmp_path: Path) -> None:
    texts = {name: [f"{name} {text}" for text in sentences(40, seed)] for seed, name in enumerate("abc")}
    weights = {"b": 2.0, "c": 0.5}
    settings: dict[str, Any] = {"tokenizer": tokenizer, "validation_fraction": 0, "weights": weights}
    data = prepared(Sentences(texts, cache_dir=str(tmp_path / "1"), **settings))
    found = documents(data, data.train_dataset)
    times = Counter(Counter(text[0] for text, _ in found))
    each = {name: len(kept(rows)) for name, rows in texts.items()}
    assert times == {"a": each["a"], "b": 2 * each["b"], "c": round(each["c"] / 2)}
    assert set(Counter(text for text, _ in found if text[0] == "b").values()) == {2}
    assert data.counts["train"]["documents"] == len(found)
    parts = ", ".join(f"{name} ({each[name]:,})" for name in texts)
    assert f"from {parts}, before their weights" in describe(data.counts["train"])
    # mixed: a window does not come from one source
    mixed = [{text[0] for text, _ in documents(data, [window])} for window in data.train_dataset]
    assert sum(len(names) > 1 for names in mixed) > len(mixed) / 2
    again = prepared(Sentences(texts, cache_dir=str(tmp_path / "2"), **settings))
    assert documents(again, again.train_dataset) == found


def test_no_source_is_left_out_for_a_small_weight(tokenizer: str, tmp_path: Path) -> None:
    texts = {"a": ["a" + text for text in sentences(40)], "b": ["b one two three four five"]}
    settings: dict[str, Any] = {"tokenizer": tokenizer, "validation_fraction": 0, "cache_dir": str(tmp_path)}
    data = prepared(Sentences(texts, weights={"b": 0.4}, **settings))
    assert sum(text[0] == "b" for text, _ in documents(data, data.train_dataset)) == 1


def test_validation_may_have_rows_of_its_own_or_be_left_out(tokenizer: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tokenizer": tokenizer, "cache_dir": str(tmp_path)}
    own = prepared(Sentences({"a": sentences(30)}, validation={"v": sentences(9, 1)}, **settings))
    assert sorted(t for t, _ in documents(own, own.train_dataset)) == sorted(f"{t}." for t in kept(sentences(30)))
    assert sorted(t for t, _ in documents(own, own.val_dataset)) == sorted(f"{t}." for t in kept(sentences(9, 1)))
    none = prepared(Sentences({"a": sentences(30)}, validation_fraction=0, **settings))
    assert none.val_dataset is None
    module = Steps()
    quiet(tmp_path, strategy="auto", devices=1, accelerator="cpu", max_epochs=2).fit(module, datamodule=none)
    assert module.tokens > 0


class Steps(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.tokens = 0
        self.seen: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.tokens += batch["input_ids"].numel()
        self.seen += [hash(tuple(row)) for row in batch["input_ids"].tolist()]
        return self.layer.weight.sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-6)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_wrong_row_ends_the_preparation_and_leaves_nothing(num_proc: int, tokenizer: str, tmp_path: Path) -> None:
    texts = sentences(60)
    texts[40] += " forbidden"
    with pytest.raises(ValueError, match=r"row '40 .* forbidden' is forbidden"):
        Sentences({"a": texts}, tokenizer=tokenizer, cache_dir=str(tmp_path), num_proc=num_proc).prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_said(tokenizer: str, tmp_path: Path) -> None:
    texts, settings = {"chats": sentences(20)}, {"cache_dir": str(tmp_path), "tokenizer": tokenizer}
    with pytest.raises(ValueError, match=r"Sentences needs a tokenizer.*no checkpoint.*Sentences\(tokenizer=\.\.\.\)"):
        Sentences(texts, cache_dir=str(tmp_path)).prepare_data()
    with pytest.raises(ValueError, match=r"'chats': \d+ training windows of sequence_length=64, but 1 data ranks with"):
        prepared(Sentences(texts, batch_size=1000, **settings))
    with pytest.raises(FileNotFoundError, match=r"prepare_data\(\) first"):
        Sentences(texts, sequence_length=77, **settings).setup("fit")
    with pytest.raises(ValueError, match=r"validation_fraction=1 must lie between 0 and 1"):
        Sentences(texts, validation_fraction=1, **settings).prepare_data()
    for number, least in (("sequence_length=1", 2), ("batch_size=0", 1), ("seed=-1", 0), ("num_proc=0", 1)):
        name, value = number.split("=")
        with pytest.raises(ValueError, match=f"{number} must be at least {least}"):
            Sentences(texts, **settings, **{name: int(value)})
    with pytest.raises(ValueError, match=r"a: weight=0 must be positive"):
        Sentences({"a": sentences(3)}, weights={"a": 0}, **settings).prepare_data()
    with pytest.raises(ValueError, match=r"2 tokens and says of 1"):
        Samples().add([1, 2], [True])


def test_the_data_module_of_the_page_runs_as_printed(tokenizer: str, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operate" / "data.md").read_text()
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], names)  # type: ignore[index]
    rows = [{"letter": f"alpha {number}", "answer": "beta gamma" * (number > 2)} for number in range(40)]
    source = tmp_path / "letters.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    data = names["Letters"](str(source), 64, tokenizer=tokenizer)
    data.cache_dir = str(tmp_path / "cache")
    prepared(data)
    found = documents(data, data.train_dataset) + documents(data, data.val_dataset)
    assert sorted(found) == sorted((f"alpha {number}beta gamma{END}", f"beta gamma{END}") for number in range(3, 40))
    dropped = [counts["dropped"].get("without an answer", 0) for counts in data.counts.values()]
    assert sum(dropped) == 3


class Slow(Sentences):
    def make_samples(self, rows: Sequence[str], samples: Samples) -> None:
        time.sleep(0.5)
        super().make_samples(rows, samples)


class Recorder(CausalLM):
    def __init__(self) -> None:
        config = tiny_config(vocab_size=512, **SMALL)
        super().__init__(
            config, False, lambda params: torch.optim.SGD(params, lr=1.0), lambda opt: Schedule(opt, "linear")
        )
        self.seen: list[list[int]] = []
        self.rates: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen += batch["input_ids"].tolist()
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)


def _train(tokenizer: str, root: Path) -> tuple[int, list[list[int]], list[float], float]:
    data = Slow({"a": sentences(100)}, tokenizer=tokenizer, cache_dir=str(root / "cache"), batch_size=1)
    module, began = Recorder(), time.monotonic()
    strategy = ExpertParallelStrategy(ep=2, timeout=timedelta(seconds=4))
    quiet(root, strategy=strategy, max_epochs=2, limit_val_batches=0).fit(module, datamodule=data)
    return len(data.train_dataset), module.seen, module.rates, time.monotonic() - began


def test_ranks_wait_for_the_preparation_beyond_the_time_out_and_take_equal_steps(
    tokenizer: str, tmp_path: Path
) -> None:
    ranks = run_ranks(2, _train, tokenizer, tmp_path, init_process_group=False)
    (windows, first, rates, seconds), (_, second, _, _) = ranks
    assert seconds > 7  # fifteen tasks of half a second: more than the time-out
    steps = windows // 2
    assert len(first) == len(second) == 2 * steps
    assert not {*map(tuple, first[:steps])} & {*map(tuple, second[:steps])}
    assert rates == pytest.approx([1 - step / (2 * steps) for step in range(2 * steps)])
    (directory,) = (tmp_path / "cache").iterdir()
    assert json.loads((directory / "train" / COUNTS).read_text())["windows"] == windows
