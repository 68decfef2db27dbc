"""Predict goes over the documents of all rows, each once, in order and by itself, whatever shares the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ep import CausalLM, ExpertParallelStrategy
from lightning_ep.callbacks import WritePredictions
from lightning_ep.data import ChatDataModule, PromptCompletionDataModule, TextDataModule
from tests.data.chat_families import family_tokenizer
from tests.hub_files import write_checkpoint
from tests.ranks import run_ranks
from tests.tiny import SMALL, quiet

LENGTH = 48
PAIRS = {
    "sums": [{"prompt": f"{i} + {i} is", "completion": f" {2 * i}." * (i + 1)} for i in range(4)],
    "words": [
        {"prompt": "Say", "completion": " nothing" * LENGTH},  # longer than a window
        {"prompt": "", "completion": "Hello"},
        {"prompt": "Good", "completion": " day to you"},
        {"prompt": "One", "completion": " more"},
    ],
}


@pytest.fixture
def hub(tmp_path: Path) -> str:
    tokenizer = family_tokenizer("qwen3")
    write_checkpoint(tmp_path / "hub", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **SMALL)
    tokenizer.save_pretrained(tmp_path / "hub")
    return str(tmp_path / "hub")


def write_rows(root: Path, name: str, rows: list[Any]) -> dict[str, str]:
    path = root / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "name": name}


def _predict(hub: str, root: Path, layout: dict[str, int]) -> None:
    from lightning_ep.data import Source

    sources = [Source(**write_rows(root, name, rows), weight=2) for name, rows in PAIRS.items()]
    data = PromptCompletionDataModule(
        sources, sequence_length=LENGTH, batch_size=2, cache_dir=str(root / "cache"), num_proc=1
    )
    writer = WritePredictions(str(root / "out.jsonl"))
    trainer = quiet(root, strategy=ExpertParallelStrategy(**layout), callbacks=[writer])
    trainer.predict(CausalLM(hub), datamodule=data, return_predictions=False)


@torch.no_grad()
def _expected(hub: str) -> list[dict[str, Any]]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hub), AutoTokenizer.from_pretrained(hub)
    found = []
    for source, rows in PAIRS.items():
        for row, pair in enumerate(rows):
            prompt = tokenizer(pair["prompt"])["input_ids"]
            ids = [*prompt, *tokenizer(pair["completion"])["input_ids"], tokenizer.eos_token_id]
            if len(ids) > LENGTH:
                continue
            log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            places = range(max(len(prompt), 1), len(ids))
            likelihood = sum(log_probs[place - 1, ids[place]].item() for place in places)
            found.append({"source": source, "row": row, "log_likelihood": likelihood, "tokens": len(places)})
    return found


@pytest.mark.parametrize(
    ("world", "layout"), [(1, {"ep": 1}), (2, {"ep": 2}), (2, {"ep": 1, "cp": 2})], ids=["alone", "ep=2", "cp=2"]
)
def test_each_row_is_written_once_with_its_likelihood(
    world: int, layout: dict[str, int], hub: str, tmp_path: Path
) -> None:
    run_ranks(world, _predict, hub, tmp_path, layout, init_process_group=False)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = _expected(hub)
    assert len(expected) == 7, "the ranks' shares must be unequal, and a row be left out"
    for index, (line, row) in enumerate(zip(lines, expected, strict=True)):
        assert line.pop("log_likelihood") == pytest.approx(row.pop("log_likelihood"), rel=1e-5)
        assert line == {"index": index, **row}


def test_chats_are_predicted_by_turns_and_windows_of_a_fit_are_others(hub: str, tmp_path: Path) -> None:
    turns = [{"role": r, "content": c} for r, c in [("user", "Hi"), ("assistant", "Hello!")] * 2]
    source = write_rows(tmp_path, "chats", [{"messages": turns}] * 3)["path"]
    data = ChatDataModule(
        source, split_turns=True, sequence_length=64, cache_dir=str(tmp_path / "cache"), num_proc=1, batch_size=1
    )
    strategy = ExpertParallelStrategy(ep=1)
    trainer = quiet(tmp_path, strategy=strategy, max_steps=1, limit_val_batches=0)
    module = CausalLM(hub)
    trainer.fit(module, datamodule=data)
    found = trainer.predict(module, datamodule=data)
    assert len(found) == 6
    assert [data.row_of(index)["row"] for index in range(6)] == [0, 0, 1, 1, 2, 2]
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert data.counts["predict"]["sources"][source] == {"rows": 3, "documents": 6, "tokens": found_tokens(data)}


def found_tokens(data: ChatDataModule) -> int:
    return sum(len(data.predict_dataset[index][0]) for index in range(len(data.predict_dataset)))


def test_what_cannot_be_predicted_is_refused_at_the_start(hub: str, tmp_path: Path) -> None:
    trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1))
    long = write_rows(tmp_path, "long", PAIRS["words"][:1])["path"]
    data = PromptCompletionDataModule(long, sequence_length=LENGTH, cache_dir=str(tmp_path), num_proc=1)
    with pytest.raises(ValueError, match=r"No row of .*long.jsonl gives a document to predict"):
        trainer.predict(CausalLM(hub), datamodule=data)
    (tmp_path / "text.txt").write_text("alpha beta")
    texts = TextDataModule(str(tmp_path / "*.txt"), cache_dir=str(tmp_path))
    random = CausalLM(AutoModelForCausalLM.from_pretrained(hub).config, pretrained=False)
    with pytest.raises(ValueError, match=r"predict needs the tokenizer that.*TextDataModule\(tokenizer"):
        trainer.predict(random, datamodule=texts)
    texts = TextDataModule(str(tmp_path / "*.txt"), cache_dir=str(tmp_path), tokenizer=hub, num_proc=1)
    (found,) = trainer.predict(random, datamodule=texts)
    assert found["tokens"].tolist() == [len(AutoTokenizer.from_pretrained(hub)("alpha beta")["input_ids"])]
