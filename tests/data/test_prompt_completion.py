"""Pairs of texts: the completion and its end are learnt."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from lightning_ep.data import PromptCompletionDataModule
from lightning_ep.data.conversations import MalformedRow
from lightning_ep.data.preparation import Samples
from lightning_ep.data.prompt_completion import MERGED
from tests.data.chat_families import family_tokenizer
from tests.data.test_chat_template import learnt_texts


def write_pairs(path: Path, pairs: list[Any], names: tuple[str, str] = ("prompt", "completion")) -> str:
    path.write_text("".join(json.dumps(dict(zip(names, pair, strict=True))) + "\n" for pair in pairs))
    return str(path)


def samples_of(tokenizer: Any, pairs: list[tuple[str, str]], tmp_path: Path) -> Samples:
    data = PromptCompletionDataModule(write_pairs(tmp_path / "pairs.jsonl", pairs))
    data.tokenizer = tokenizer
    data.check()
    samples = Samples()
    (rows,) = data.sources()
    data.make_samples(rows.read(range(rows.count)), samples)
    return samples


def test_the_completion_and_its_end_are_learnt(tmp_path: Path) -> None:
    tokenizer = family_tokenizer("mixtral")  # which begins texts with <s>
    samples = samples_of(tokenizer, [("2 + 2 is", " 4."), ("Hello there!\n", ""), ("", "Hello")], tmp_path)
    assert learnt_texts(tokenizer, samples) == [[" 4.</s>"], ["</s>"], ["Hello</s>"]]
    assert [tokenizer.decode(ids) for ids, _ in samples.samples] == [
        "<s>2 + 2 is 4.</s>",
        "<s>Hello there!\n</s>",
        "<s>Hello</s>",
    ]
    assert not +samples.notes


def test_an_end_that_the_tokenizer_writes_itself_is_there_once(tmp_path: Path) -> None:
    tokenizer = type(family_tokenizer("mixtral"))(
        tokenizer_object=family_tokenizer("mixtral").backend_tokenizer.__class__.from_str(
            family_tokenizer("mixtral").backend_tokenizer.to_str()
        ),
        bos_token="<s>",
        eos_token="</s>",
    )
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    assert tokenizer.decode(tokenizer("a")["input_ids"]) == "<s>a</s>"
    samples = samples_of(tokenizer, [("2 + 2 is", " 4.")], tmp_path)
    assert [tokenizer.decode(ids) for ids, _ in samples.samples] == ["<s>2 + 2 is 4.</s>"]
    assert learnt_texts(tokenizer, samples) == [[" 4.</s>"]]


def test_completions_that_begin_inside_a_token_are_counted(tmp_path: Path) -> None:
    tokenizer = family_tokenizer("qwen3")
    whole = next(token for token in ("Hello", "there", "tokenizer") if len(tokenizer.tokenize(token)) == 1)
    samples = samples_of(tokenizer, [(whole[:2], whole[2:])], tmp_path)
    assert samples.notes == {MERGED: 1}
    assert learnt_texts(tokenizer, samples) == [["<|im_end|>"]]


def test_columns_may_have_other_names_and_are_texts(tmp_path: Path) -> None:
    family_tokenizer("qwen3").save_pretrained(tmp_path / "tokenizer")
    settings: dict[str, Any] = {
        "tokenizer": str(tmp_path / "tokenizer"),
        "validation_fraction": 0,
        "cache_dir": str(tmp_path / "cache"),
        "num_proc": 1,
        "sequence_length": 64,
    }
    path = write_pairs(tmp_path / "pairs.jsonl", [("2 + 2?", " 4"), ("Hi", " there")], ("question", "answer"))
    data = PromptCompletionDataModule(path, prompt="question", completion="answer", **settings)
    data.prepare_data()
    data.setup()
    assert data.counts["train"]["documents"] == 2
    with pytest.raises(MalformedRow, match=r"pairs.jsonl:1: the column 'prompt' must be a text"):
        PromptCompletionDataModule(path, **settings).prepare_data()
    path = write_pairs(tmp_path / "messages.jsonl", [([{"role": "user", "content": "Hi"}], [])])
    with pytest.raises(MalformedRow, match=r"messages.jsonl:1: .*Lists of messages are for ChatDataModule"):
        PromptCompletionDataModule(path, **settings).prepare_data()


def test_an_end_at_which_the_model_does_not_stop_is_refused(tmp_path: Path) -> None:
    data = PromptCompletionDataModule(write_pairs(tmp_path / "pairs.jsonl", [("a", "b")]))
    data.tokenizer = family_tokenizer("qwen3")
    data.stop_ids = lambda: [0]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"end of text is '<\|im_end\|>'.*does not stop.*is \[0\]"):
        data.check()


def test_a_tokenizer_that_does_not_know_its_characters_is_refused(tmp_path: Path) -> None:
    data = PromptCompletionDataModule(write_pairs(tmp_path / "pairs.jsonl", [("a", "b")]))
    data.tokenizer = SimpleNamespace(is_fast=False, name_or_path="slow")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"The tokenizer \(slow\).*does not know which characters"):
        data.check()
