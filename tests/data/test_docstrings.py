"""The chats of the chat quick start say what the docstrings of source files say, and bring their tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_ep.data.examples import DocstringChats, docstrings

SOURCE = '''"""A module."""
def add(a, b):
    """Add two numbers, e.g. 1 and 2.

    More on adding.
    """
def _private():
    """Do something private."""
def plain():
    pass
def shapeless():
    """no sentence here"""
class Box:
    """Hold one thing (or
    none). It is made of wood.
    """
    def open(self):
        """Open the box."""
        def inner():
            """Be inside."""
    class Lid:
        """Lie on the box."""
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "lib"
    (root / "shop").mkdir(parents=True)
    (root / "shop" / "__init__.py").write_text(SOURCE)
    (root / "sums.py").write_text('def total():\n    """Return the sum."""\n')
    monkeypatch.setattr(docstrings, "standard_library", lambda: list(root.rglob("*.py")))
    return root


def test_questions_are_answered_by_the_first_sentence(library: Path, tmp_path: Path) -> None:
    file = docstrings.docstring_chats(tmp_path / "cache")
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in rows)
    assert {row[0]["content"]: row[1]["content"] for row in rows} == {
        "What does the class Box of shop do?": "In short: Hold one thing (or none).",
        "What does the method Box.open of shop do?": "In short: Open the box.",
        "What does the class Box.Lid of shop do?": "In short: Lie on the box.",
        "What does the function total of sums do?": "In short: Return the sum.",
    }
    assert docstrings.docstring_chats(tmp_path / "cache") == file
    (library / "sums.py").write_text('def total():\n    """Give the sum."""\n')
    assert docstrings.docstring_chats(tmp_path / "cache") != file


def test_a_model_without_a_tokenizer_gets_one(library: Path, tmp_path: Path) -> None:
    data = DocstringChats(
        vocab_size=260, chat_template="plain", sequence_length=128, batch_size=1, validation_fraction=0.3, num_proc=1,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    assert len(data.tokenizer) == 260
    labels = data.train_dataset[0]["labels"]
    learnt = data.tokenizer.decode(labels[labels != -100])
    assert learnt.startswith("In short: ")
    assert learnt.endswith(".<|endoftext|>")
    assert data.counts["train"]["documents"] + data.counts["val"]["documents"] == 4
