"""The conversations of the chat quick start: questions about Python's standard library, which its docstrings answer."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_ep.data import corpus
from lightning_ep.data.cache import cache_root
from lightning_ep.data.chat import ChatDataModule
from lightning_ep.data.packed_data import PackedDataModule
from lightning_ep.data.preparation import Part, Rows
from lightning_ep.data.row_files import open_source
from lightning_ep.data.standard_library import standard_library

_SENTENCE = re.compile(r"[A-Z][^.]*[a-z)'\"]\.(?=\s|\Z)")
_LONGEST = 100


class DocstringChats(ChatDataModule):
    """Questions about Python's standard library, answered in one form: "In short: " and a docstring's first sentence.

    A model with random weights gets a byte-level BPE tokenizer that is trained on the conversations; one that starts
    from a checkpoint keeps its own. The conversations are a file of JSON lines in the cache, made once.

    Args:
        vocab_size: Size of the vocabulary of a tokenizer that is trained here.
        **chat: Those of `ChatDataModule`.
    """

    kind = "docstrings"

    def __init__(self, vocab_size: int = 1024, **chat: Any) -> None:
        super().__init__(source="stdlib", **chat)
        self.vocab_size = vocab_size

    @override
    def sources(self) -> Sequence[Rows]:
        return [open_source(str(docstring_chats(cache_root(self.cache_dir))))]

    @override
    def first_rows(self) -> Sequence[Rows]:
        return PackedDataModule.first_rows(self)

    @override
    def settings(self) -> Sequence[object]:
        return self.vocab_size, *super().settings()

    @override
    def make_tokenizer(self, directory: Path, training: Sequence[Part]) -> None:
        """Train one, on the conversations to train on."""
        rows = (row for part in training for row in part.rows.read(part.indices.tolist()))
        texts = (message["content"] for row in rows for message in row.columns()["messages"])
        self.tokenizer = corpus.train_tokenizer(texts, self.vocab_size)
        self.tokenizer.save_pretrained(directory)
        self.check()


def docstring_chats(cache: Path) -> Path:
    """The conversations as a file of JSON lines in a directory of ``cache``, written unless it is there."""
    files = standard_library()
    directory = cache / f"docstrings-{corpus.fingerprint(sorted(files), Path(__file__).read_text())}"

    def build(scratch: Path) -> None:
        lines = {json.dumps({"messages": _messages(*found)}) + "\n": None for found in _sentences(sorted(files))}
        (scratch / "chats.jsonl").write_text("".join(lines))

    corpus.build_once(directory, build)
    return directory / "chats.jsonl"


def _messages(module: str, kind: str, name: str, sentence: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"What does the {kind} {name} of {module} do?"},
        {"role": "assistant", "content": f"In short: {sentence}"},
    ]


def _sentences(files: Sequence[Path]) -> Iterator[tuple[str, str, str, str]]:
    """Module, kind, name and first sentence of what is documented in source files."""
    root = Path(os.path.commonpath(files))
    for file in files:
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for kind, name, docstring in _documented(ast.parse(file.read_bytes()), ""):
            found = _SENTENCE.match(" ".join(docstring.split()))
            if found is not None and len(found[0]) <= _LONGEST:
                yield module, kind, name, found[0]


def _documented(node: ast.Module | ast.ClassDef, inside: str) -> Iterator[tuple[str, str, str]]:
    """Kind, name and docstring of the functions, methods and classes in a module or a class."""
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        kind = "class" if isinstance(child, ast.ClassDef) else "method" if inside else "function"
        if docstring := ast.get_docstring(child):
            yield kind, inside + child.name, docstring
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, f"{child.name}.")
