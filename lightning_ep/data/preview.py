"""What a data module makes of the first rows of its sources, to be read by people: which tokens are learnt."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from lightning_ep.data.packed_data import PackedDataModule
from lightning_ep.data.preparation import Made, Part, Rows, Samples
from lightning_ep.data.row_files import Row
from lightning_ep.data.windows import PADDING, best_fit, number_of_tokens

SHOWN = 5
"""Documents that a preview shows."""
_BEGIN, _END = 400, 200  # tokens of a long document that are shown


@dataclass(frozen=True)
class Document:
    """A document, and the row that it was made of."""

    where: str
    tokens: np.ndarray
    learnt: np.ndarray

    @property
    def size(self) -> int:
        """Tokens, without padding."""
        return number_of_tokens(self.tokens)


@dataclass
class Looked:
    """What became of the rows of one source that were looked at."""

    rows: int = 0
    documents: list[Document] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, made: Made, where: str) -> None:
        """Adds what a row became."""
        self.rows += made.rows
        ends = np.cumsum(made.lengths)[:-1]
        pairs = zip(np.split(made.tokens, ends), np.split(made.supervised, ends), strict=True)
        self.documents += [Document(where, tokens, learnt) for tokens, learnt in pairs if len(tokens)]
        self.dropped.update(made.dropped)
        self.notes.update(made.notes)

    def __str__(self) -> str:
        tokens = sum(document.size for document in self.documents)
        learnt = sum(int(document.learnt[1:].sum()) for document in self.documents)
        line = f"{self.rows:,} rows, {len(self.documents):,} documents, {tokens:,} tokens, "
        line += f"{learnt / max(1, tokens):.1%} of them supervised"
        if self.dropped:
            line += "; left out: " + ", ".join(f"{count:,} {what}" for what, count in sorted(self.dropped.items()))
        return line + "".join(f"; {count:,} {what}" for what, count in sorted(self.notes.items()))


def preview(data: PackedDataModule, colour: bool) -> Iterator[str]:
    """Lines on some documents, which show what is learnt of them, and on what else the first rows of each source give.

    Nothing is prepared, and what follows the first rows is not read.

    Args:
        data: The data module. Its ``trains`` is the module that will be trained.
        colour: Show what is learnt in green, for terminals. Otherwise it stands between ⟦ and ⟧.

    Raises:
        ValueError: What preparing these rows would raise.
    """
    sources = data.first_rows()
    with tempfile.TemporaryDirectory() as directory:
        data.load_tokenizer(Path(directory), [Part(rows, np.arange(rows.count)) for rows in sources])
        if data.makes_tokenizer:
            yield "The tokenizer of this preview was made of these rows alone; that of the run is made of all."
        looked = _look(data, sources)
        yield from _show(data, looked, colour)


def _look(data: PackedDataModule, sources: Sequence[Rows]) -> dict[str, Looked]:
    looked: dict[str, Looked] = {}
    for rows in sources:
        source = looked.setdefault(rows.name, Looked())
        for index, row in enumerate(rows.read(range(rows.count))):
            samples = Samples()
            data.make_samples([row], samples)  # alone, so that its documents are known to be its own
            where = row.where if isinstance(row, Row) else f"{rows.name}, row {index}"
            source.add(Made.of(samples, 1, data.window_length), where)
    return looked


def _show(data: PackedDataModule, looked: dict[str, Looked], colour: bool) -> Iterator[str]:
    chosen = _choose(looked, data.seed)
    how = "in green" if colour else "between ⟦ and ⟧"
    yield f"{len(chosen)} documents. What is learnt is {how}. In a window they follow one another, and see none other."
    for document in chosen:
        head = f"── {document.where}: {document.size:,} tokens, {int(document.learnt[1:].sum()):,} supervised "
        yield ""
        yield f"\x1b[1m{head:─<100}\x1b[0m" if colour else f"{head:─<100}"
        yield _written(data.tokenizer, document, colour, data.placeholders).rstrip("\n")
    yield "─" * 100
    yield ""
    for name, source in looked.items():
        yield f"{name}: {source}"
    documents = [document for source in looked.values() for document in source.documents]
    windows = len(list(best_fit([len(document.tokens) for document in documents], data.window_length)))
    fill = sum(document.size for document in documents) / max(1, windows * data.window_length)
    yield f"These documents fill {windows:,} windows of {data.window_length:,} tokens to {fill:.1%}."
    yield "Counted are the first rows of each source, held out or not; `lightning-ep prepare` counts all."


def _choose(looked: dict[str, Looked], seed: int) -> list[Document]:
    """Documents of all sources in turns, at random."""
    rng = np.random.default_rng(seed)
    mixed = [[source.documents[i] for i in rng.permutation(len(source.documents))] for source in looked.values()]
    turns = (document for turn in zip_longest(*mixed) for document in turn if document is not None)
    return list(islice(turns, SHOWN))


def _written(tokenizer: Any, document: Document, colour: bool, placeholders: Sequence[int]) -> str:
    """The text of a document, in which what is learnt is marked; of a run of one placeholder its length is left."""
    tokens, learnt = document.tokens, document.learnt.copy()
    learnt[0] = False  # there is nothing to predict it from
    text, end = "", 0
    apart = {PADDING, *placeholders}
    for placeholder, run in groupby(token if token in apart else None for token in tokens.tolist()):
        begin, end = end, end + len(list(run))
        if placeholder == PADDING:
            text += f"\n[padding x {end - begin:,}]\n"
        elif placeholder is None:
            text += _shortened(tokenizer, tokens[begin:end], learnt[begin:end], colour)
        else:
            text += f"{tokenizer.decode([placeholder])} x {end - begin:,}"
    return text


def _shortened(tokenizer: Any, tokens: np.ndarray, learnt: np.ndarray, colour: bool) -> str:
    """A text without the middle of a long one."""
    size = len(learnt)
    if size <= _BEGIN + _END:
        return _marked(tokenizer, tokens, learnt, colour)
    begin, end = slice(0, _BEGIN), slice(size - _END, size)
    middle = learnt[_BEGIN : size - _END]
    return (
        _marked(tokenizer, tokens[begin], learnt[begin], colour)
        + f"\n[... {len(middle):,} tokens, of which {int(middle.sum()):,} are supervised ...]\n"
        + _marked(tokenizer, tokens[end], learnt[end], colour)
    )


def _marked(tokenizer: Any, tokens: np.ndarray, learnt: np.ndarray, colour: bool) -> str:
    text, end, before = "", 0, ""
    for marked, run in groupby(learnt.tolist()):
        end += len(list(run))
        # Of the whole: a piece alone would lose its first space with some tokenizers.
        whole = tokenizer.decode(tokens[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece = whole[len(before) :].replace("\x1b", "␛")  # not what a terminal takes for a command
        text += _mark(piece, colour) if marked else piece
        before = whole
    return text


def _mark(piece: str, colour: bool) -> str:
    if not colour:
        return f"⟦{piece}⟧"
    # By line: pagers forget colours at its end.
    return "\n".join(f"\x1b[32m{line}\x1b[0m" if line else "" for line in piece.split("\n"))
