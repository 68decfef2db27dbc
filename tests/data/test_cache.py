"""One process of a node finds out what data is prepared; the others are told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_ep import ExpertParallelStrategy
from lightning_ep.data import Rows, cache
from tests.data.test_packed_data import Recorder, Sentences, sentences, tokenizer
from tests.ranks import run_ranks
from tests.tiny import quiet

__all__ = ["tokenizer"]  # a fixture


class Asked(Sentences):
    times = 0

    def sources(self) -> list[Rows]:
        self.times += 1
        return super().sources()


def _fit(tokenizer: str, root: Path) -> tuple[int, int]:
    data = Asked({"a": sentences(60)}, tokenizer=tokenizer, cache_dir=str(root), batch_size=1)
    trainer = quiet(root, strategy=ExpertParallelStrategy(ep=2), max_steps=1, limit_val_batches=1)
    trainer.fit(Recorder(), datamodule=data)
    trainer.validate(Recorder(), datamodule=data, verbose=False)
    return data.times, len(data.train_dataset)


def test_only_the_process_that_prepares_asks_for_sources(tokenizer: str, tmp_path: Path) -> None:
    (first, windows), (second, others) = run_ranks(2, _fit, tokenizer, tmp_path, init_process_group=False)
    assert first == 2  # once for each of fit and validate
    assert second == 0
    assert windows == others > 0


def _data(**trainer: Any) -> Any:
    defaults = {"world_size": 2, "local_rank": 0, "is_global_zero": True}
    return SimpleNamespace(trainer=SimpleNamespace(**defaults | trainer), prepare_data_per_node=True)


def test_nodes_with_different_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text-1").mkdir()
    told: list[str | None] = ["text-1", None, "text-2", None]
    monkeypatch.setattr(cache, "from_all_ranks", lambda name: told)
    with pytest.raises(ValueError, match=r"nodes have prepared different data, text-1 and text-2 in"):
        cache.find_prepared(_data(), "text-1", lambda: "text-1", tmp_path)
    told[2] = "text-1"
    found = cache.find_prepared(_data(local_rank=1), None, lambda: "another", tmp_path)
    assert found == tmp_path / "text-1"


def test_a_process_that_prepared_for_itself_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(cache, "from_all_ranks", lambda name: said.append(name) or ["text-1", name])
    (tmp_path / "text-1").mkdir()
    assert cache.find_prepared(_data(local_rank=1), "text-2", lambda: "text-2", tmp_path) == tmp_path / "text-1"
    assert said == [None]
