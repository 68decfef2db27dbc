"""Weights of a checkpoint are trained with its tokenizer, and no tokenizer has more tokens than the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lightning_ep import CausalLM, from_pretrained
from lightning_ep.callbacks import GenerateSamples, HuggingFaceExport
from lightning_ep.data import ChatDataModule, TextDataModule, corpus
from tests.hub_files import write_checkpoint
from tests.tiny import Samples, quiet

SGD = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1)}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for number in range(6):
        (root / f"{number}.txt").write_text(" ".join(rng.choice(["alpha", "beta", "gamma"], 60)))
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with a tokenizer, trained on other texts, whose end of text is not the last thing that it knows."""
    path = tmp_path_factory.mktemp("hub") / "tiny"
    write_checkpoint(path, num_hidden_layers=1, vocab_size=320, eos_token_id=0)
    tokenizer = corpus.train_tokenizer(iter(["zeta eta theta " * 50]), 262)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.save_pretrained(path)
    return path


def data(texts: Path, cache: Path, **settings: Any) -> TextDataModule:
    defaults: dict[str, Any] = {"sequence_length": 16, "batch_size": 2, "validation_fraction": 0.2, "vocab_size": 300}
    return TextDataModule(str(texts), cache_dir=str(cache), **(defaults | settings))


def trainer(root: Path, **settings: Any) -> Any:
    return quiet(root, strategy="ep", devices=1, accelerator="cpu", max_steps=1, num_sanity_val_steps=0, **settings)


class Own(LightningModule):
    """A module of a user's, which builds its model where Lightning wants it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.model = path, None

    def configure_model(self) -> None:
        self.model = self.model or from_pretrained(self.path)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_published_weights_are_trained_and_exported_with_their_tokenizer(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    windows = data(texts, tmp_path / "cache", sequence_length=512, batch_size=1)  # which hold a text each
    module = CausalLM(str(checkpoint), **SGD)
    trainer(tmp_path, callbacks=[HuggingFaceExport(str(tmp_path / "out"))]).fit(module, windows)
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    used = torch.cat([row["input_ids"] for row in windows.train_dataset]).tolist()
    names = {path.read_text() for path in texts.iterdir()}
    assert len(theirs("alpha")["input_ids"]) > 2, "of other texts"
    whole = set(theirs.decode(used).split("<|endoftext|>")) - {""}
    assert len(whole) > 2
    assert whole <= names
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.get_vocab() == theirs.get_vocab()
    assert exported("alpha <|turn|>")["input_ids"] == theirs("alpha <|turn|>")["input_ids"]


def test_a_tokenizer_may_have_several_chat_templates(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "several")
    assert list((tmp_path / "several").glob("*/tool_use.jinja")), "which lies below the tokenizer's directory"
    module = data(texts, tmp_path / "cache", tokenizer=str(tmp_path / "several"))
    module.prepare_data()
    module.setup("fit")
    assert module.tokenizer.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("none", [None, -1, []])
def test_chats_are_refused_where_neither_model_nor_tokenizer_has_an_end(none: object, tmp_path: Path) -> None:
    tokenizer = corpus.train_tokenizer(iter(["zeta eta theta " * 50]), 262)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|endoftext|>' }}{% endfor %}"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": none}))
    with pytest.raises(ValueError, match=r"with '<\|endoftext\|>' \(0\).*does not stop: eos_token_id .* is \[\]"):
        ChatDataModule("chats.jsonl", tokenizer=str(tmp_path)).prepare_data()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_before_it_is_built(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    corpus.train_tokenizer((path.read_text() for path in texts.iterdir()), 400).save_pretrained(tmp_path / "mine")
    small = tmp_path / "small"
    write_checkpoint(small, num_hidden_layers=1, vocab_size=128)
    module = CausalLM(str(small), **SGD)
    with pytest.raises(ValueError, match=r"vocab_size=128 is smaller than the tokenizer's 26\d tokens.*not .*tiny"):
        trainer(tmp_path).fit(module, data(texts, tmp_path / "cache", tokenizer=str(checkpoint)))
    assert module.model is None


class _Mine(LightningDataModule):
    """A user's, which tokenized with something else than the model was made for."""

    def __init__(self, tokenizer: Path) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Samples(4), batch_size=2)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("what", ["generation", "export"])
def test_callbacks_refuse_a_tokenizer_with_more_tokens_than_the_model(
    what: str, checkpoint: Path, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "small", num_hidden_layers=1, vocab_size=128)
    callback = GenerateSamples(["a"]) if what == "generation" else HuggingFaceExport(str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"vocab_size=128 is smaller than the tokenizer's 26\d tokens"):
        trainer(tmp_path, callbacks=[callback]).fit(CausalLM(str(tmp_path / "small"), **SGD), _Mine(checkpoint))


def test_a_module_that_builds_its_model_late_has_to_say_whose_weights_they_are(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"Pass TextDataModule\(tokenizer='.*tiny'\)"):
        trainer(tmp_path).fit(Own(checkpoint), data(texts, tmp_path / "cache"))
    module = Own(checkpoint)
    module.pretrained_path = str(checkpoint)
    declared, passed = data(texts, tmp_path / "cache"), data(texts, tmp_path / "cache", tokenizer=str(checkpoint))
    trainer(tmp_path).fit(module, declared)
    trainer(tmp_path).fit(Own(checkpoint), passed)
    theirs = AutoTokenizer.from_pretrained(checkpoint).get_vocab()
    assert declared.tokenizer.get_vocab() == passed.tokenizer.get_vocab() == theirs


def test_other_ids_of_special_tokens_are_told(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_checkpoint(other, num_hidden_layers=1, vocab_size=320, eos_token_id=7)
    windows = data(texts, tmp_path / "cache", tokenizer=str(checkpoint))
    with pytest.warns(UserWarning, match="eos_token_id is 0 in the tokenizer and 7 in the model's configuration"):
        trainer(tmp_path).fit(CausalLM(str(other), **SGD), windows)


def test_weights_without_a_tokenizer_get_one_with_a_warning(texts: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    write_checkpoint(bare, num_hidden_layers=1, vocab_size=320)
    with pytest.warns(UserWarning, match=r"bare, whose weights the model starts from, has no tokenizer"):
        trainer(tmp_path).fit(CausalLM(str(bare), **SGD), data(texts, tmp_path / "cache"))


def test_the_module_of_the_page_runs_as_printed(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operate" / "checkpoints.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.S)[1]  # type: ignore[index]
    values = {  # of this machine: sizes, paths, one process
        '"Qwen/Qwen3-30B-A3B"': repr(str(checkpoint)),
        "sequence_length=4096": "sequence_length=16, validation_fraction=0.2",
        '"auto"': "1, accelerator='cpu'",
        "max_steps=1000": "max_steps=1",
    }
    for printed, ours in values.items():
        assert printed in code
        code = code.replace(printed, ours)
    monkeypatch.setenv("LIGHTNING_EP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").symlink_to(texts)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["trainer"].global_step == 1
