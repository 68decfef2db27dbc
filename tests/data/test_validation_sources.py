"""The validation loss of each source: exact whatever the number of windows and ranks, under names that users choose."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ep import CausalLM, ExpertParallelStrategy
from lightning_ep.data import ChatDataModule, Source
from tests.data.chat_families import family_tokenizer
from tests.data.test_packed_data import Sentences, kept, sentences, tokenizer
from tests.hub_files import write_checkpoint
from tests.ranks import run_ranks
from tests.reference import tiny_config
from tests.tiny import SMALL, loader, quiet

__all__ = ["tokenizer"]  # a fixture

# In windows of 64 tokens: more than two ranks share evenly, one only, and none of whose rows anything is kept.
VALIDATION = {"many": sentences(23, 1), "chats/few": sentences(3, 2), "none": ["too short", "also short"]}


def _validate(hub: str, tokenizer: str, root: Path, batch_size: int, ep: int) -> tuple[dict[str, float], list[int]]:
    data = Sentences(
        {"a": sentences(40)}, validation=VALIDATION, tokenizer=tokenizer, cache_dir=str(root), batch_size=batch_size
    )
    trainer = quiet(root, strategy=ExpertParallelStrategy(ep=ep))
    metrics = trainer.validate(CausalLM(hub), datamodule=data, verbose=False)[0]
    return metrics, [data.counts["val"]["sources"][name]["windows"] for name in VALIDATION]


@torch.no_grad()
def _expected(hub: str, tokenizer: str) -> dict[str, float]:
    model, words = AutoModelForCausalLM.from_pretrained(hub), AutoTokenizer.from_pretrained(tokenizer)
    sums: dict[str, list[float]] = {}
    for name, texts in VALIDATION.items():
        for text in kept(texts):
            encoded = words(text + ".", return_offsets_mapping=True)
            begin = len(" ".join(text.split()[:3]))
            ids = torch.tensor([encoded["input_ids"]])
            log_probs = model(ids).logits[0].double().log_softmax(-1)
            for place, (first, _) in enumerate(encoded["offset_mapping"][1:]):
                if first >= begin:
                    sums.setdefault(name, []).append(-log_probs[place, ids[0, place + 1]].item())
    losses = {f"val/loss/{name}": sum(found) / len(found) for name, found in sums.items()}
    whole = [loss for found in sums.values() for loss in found]
    return {"val/loss": sum(whole) / len(whole), **losses}


@pytest.mark.parametrize(("world", "batch_size", "ep"), [(1, 2, 1), (2, 1, 2), (2, 3, 1)])
def test_each_source_has_its_loss_over_all_of_its_tokens(
    world: int, batch_size: int, ep: int, tokenizer: str, tmp_path: Path
) -> None:
    hub = str(tmp_path / "hub")
    write_checkpoint(tmp_path / "hub", vocab_size=512, initializer_range=0.3, **SMALL)
    ranks = run_ranks(world, _validate, hub, tokenizer, tmp_path, batch_size, ep, init_process_group=False)
    expected = _expected(hub, tokenizer)
    for metrics, windows in ranks:
        assert windows[0] % 2 == 1, "ranks must have unequal shares"
        assert windows[1:] == [1, 0]
        assert metrics.keys() == {*expected, "val/perplexity"}
        assert [metrics[name] for name in expected] == pytest.approx(list(expected.values()), rel=1e-5)
    assert len({round(loss, 3) for loss in expected.values()}) == 3


class OwnStep(CausalLM):
    """Knows nothing of several loaders, and gives a mean that windows without targets would spoil."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        loss = self.model(**batch).loss  # type: ignore[misc]
        assert loss.isfinite()
        self.log("mine", loss)

    def on_validation_epoch_end(self) -> None:
        pass


def _data(tokenizer: str, root: Path, **settings: Any) -> Sentences:
    return Sentences({"a": sentences(40)}, tokenizer=tokenizer, cache_dir=str(root), **settings)


def test_modules_with_a_step_of_their_own_get_one_loader(tokenizer: str, tmp_path: Path) -> None:
    data = _data(tokenizer, tmp_path, validation=VALIDATION)
    module = OwnStep(tiny_config(vocab_size=512, **SMALL), pretrained=False)
    trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1))
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    assert list(metrics) == ["mine"]
    assert trainer.num_val_batches == [-(-data.counts["val"]["windows"] // 2)]


def test_losses_of_other_loaders_have_their_keys_or_numbers_whatever_was_evaluated_before(tmp_path: Path) -> None:
    module = CausalLM(tiny_config(**SMALL), False, lambda params: torch.optim.SGD(params, lr=0.0))
    trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1), max_steps=1)

    def batches(size: int, first: int = 0) -> DataLoader:
        inputs = loader(size, first=first)
        return DataLoader(inputs.dataset, batch_size=2, collate_fn=_without_ids)

    trainer.fit(module, batches(4), batches(2))
    assert not [name for name in trainer.callback_metrics if name.startswith("val/loss/")]
    sizes = {"a": 4, "b c": 2, "d": 2}
    (named,) = {
        frozenset(m) for m in trainer.validate(module, {n: batches(s) for n, s in sizes.items()}, verbose=False)
    }
    assert named == {"val/loss", "val/perplexity", *(f"val/loss/{name}" for name in sizes)}
    metrics = trainer.test(module, [batches(4), batches(2)], verbose=False)[0]
    assert metrics.keys() == {"test/loss", "test/perplexity", "test/loss/0", "test/loss/1"}
    assert 6 * metrics["test/loss"] == pytest.approx(4 * metrics["test/loss/0"] + 2 * metrics["test/loss/1"], rel=1e-6)


def _without_ids(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels")}


def test_users_name_sources_and_sources_of_one_name_are_one(tmp_path: Path) -> None:
    family_tokenizer("qwen3").save_pretrained(tmp_path / "tokenizer")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    paths = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    data = ChatDataModule(
        paths[0],
        [Source(paths[0], name="greetings"), Source(paths[1], name="greetings"), paths[2]],
        tokenizer=str(tmp_path / "tokenizer"),
        cache_dir=str(tmp_path / "cache"),
        sequence_length=64,
        num_proc=1,
    )
    data.prepare_data()
    data.setup("validate")
    counts = data.counts["val"]["sources"]
    assert {name: some["rows"] for name, some in counts.items()} == {"greetings": 2, paths[2]: 1}


def test_the_page_names_sources() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operate" / "data.md").read_text()
    (block,) = re.findall(r"```yaml\n(validation_source: .*?)```", page, re.S)
    parser = ArgumentParser()
    parser.add_class_arguments(ChatDataModule, "data")
    given = yaml.safe_load(block) | {"source": "chats.jsonl"}
    data = parser.instantiate(parser.parse_object({"data": given})).data
    assert [source.name for source in data.validation_source] == ["sums", "letters"]


def test_a_fit_logs_the_loss_of_held_out_rows_of_each_source(tokenizer: str, tmp_path: Path) -> None:
    data = Sentences(
        {"a": sentences(40), "b": sentences(20, 1)}, tokenizer=tokenizer, cache_dir=str(tmp_path), batch_size=4
    )
    module = CausalLM(tiny_config(vocab_size=512, **SMALL), pretrained=False)
    trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1), max_steps=2, val_check_interval=2)
    trainer.fit(module, datamodule=data)
    assert {"val/loss", "val/loss/a", "val/loss/b"} <= trainer.callback_metrics.keys()
