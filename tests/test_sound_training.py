"""CausalLM on conversations with sound, through the Trainer: training equals plain transformers, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.sound import clip, heard, plain_inputs, write_thinker_checkpoint
from tests.test_vision_training import trains_like_transformers
from tests.vision import picture


def conversations(folder: Path) -> list[list[dict[str, Any]]]:
    """Half of them with sound, one with an image too; of lengths by which a window of 64 holds one."""
    folder.mkdir()
    clips = [clip(folder / f"{number}.wav", 1.0 + 0.17 * number, number) for number in range(3)]
    small = picture(folder / "small.png", (24, 16))
    rows = [heard("What is it?", clips[number % 3], answer=f"It is number {number}. ") for number in range(3)]
    rows.append(heard(small, clips[0], "Both?", answer="Yes. "))
    return rows + [heard(f"How much is {number} and {number}?", answer="Too much to say. ") for number in range(4)]


def _wrong(tmp_path: Path, **options: Any) -> list[str]:
    checkpoint = write_thinker_checkpoint(tmp_path / "tiny")
    return trains_like_transformers(tmp_path, checkpoint, conversations(tmp_path / "files"), plain_inputs, **options)


def test_packed_conversations_with_sound_on_one_rank(tmp_path: Path) -> None:
    assert _wrong(tmp_path, freeze=[]) == []


def test_the_towers_keep_their_weights_and_what_projects_trains(tmp_path: Path) -> None:
    assert _wrong(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed(mode: str, tmp_path: Path) -> None:
    assert _wrong(tmp_path, freeze=[], strategy={"ep": 2, "activation_checkpointing": mode}) == []


@pytest.mark.slow
def test_a_conversation_a_row(tmp_path: Path) -> None:
    assert _wrong(tmp_path, pack=False) == []


@pytest.mark.slow
def test_in_bf16(tmp_path: Path) -> None:
    assert _wrong(tmp_path, tolerance=0.3, precision="bf16-mixed", freeze=[]) == []


@pytest.mark.slow
def test_matrices_of_the_text_are_split(tmp_path: Path) -> None:
    assert _wrong(tmp_path, strategy={"ep": 2, "tp": 2}, data_ranks=1, freeze=[], seed=1) == []
