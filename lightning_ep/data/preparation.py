"""Rows of sources become windows on disk: samples are made by several processes, and packed by one."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from lightning_ep.data.document_files import DocumentFiles, Documents
from lightning_ep.data.windows import COLUMNS, Fill, Sample, best_fit, fill_window, number_of_tokens

if TYPE_CHECKING:
    from lightning_ep.data.media import Medium

WINDOWS, COUNTS = "windows.arrow", "counts.json"
"""The files that `prepare` makes."""

FORMAT = 5
"""Part of every cache's key: to be raised when the same rows give other windows."""

_WINDOWS_PER_WRITE = 64


@dataclass(frozen=True)
class Rows:
    """The rows of one source, of which nothing is in memory yet.

    Attributes:
        name: What messages call the source.
        count: Number of rows.
        fingerprint: Changes with the rows' contents.
        read: Returns the rows of these indices; called in worker processes, which are forked.
        weight: How often each of its samples comes in an epoch: 2 is twice; 0.5 is once for a random half of them, the
            same half in every epoch.
        rows_per_task: Rows that a worker reads at a time: fewer where rows are large.
    """

    name: str
    count: int
    fingerprint: str
    read: Callable[[Sequence[int]], Sequence[Any]] = field(repr=False)
    weight: float = 1.0
    rows_per_task: int = 256

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"{self.name}: weight={self.weight} must be positive. Leave the source out instead.")


@dataclass(frozen=True)
class Part:
    """Some rows of a source."""

    rows: Rows
    indices: np.ndarray


class Samples:
    """What rows became, in their order.

    Attributes:
        samples: The documents.
        media: For each of them, what its places for images and clips stand for, in order.
        dropped: How many samples were left out, by reason.
        notes: How often something else happened that the log should say.
    """

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.media: list[Sequence[Medium]] = []
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    def add(self, input_ids: Sequence[int], supervised: Sequence[bool], media: Sequence[Medium] = ()) -> None:
        """Adds a document; see `Sample`.

        Raises:
            ValueError: If not every token is said to be supervised or not.
        """
        if len(input_ids) != len(supervised):
            raise ValueError(f"A sample has {len(input_ids)} tokens and says of {len(supervised)} if they count.")
        self.samples.append(Sample(input_ids, supervised))
        self.media.append(media)

    def drop(self, reason: str, count: int = 1) -> None:
        """Counts samples that are left out; the log says "3 {reason}"."""
        self.dropped[reason] += count

    def note(self, what: str, count: int = 1) -> None:
        """Counts what the log should say beside: "3 {what}"."""
        if count:
            self.notes[what] += count


MakeSamples = Callable[[Sequence[Any], Samples], None]
"""Adds to the samples what rows become; the same whichever rows come along with them."""


def refuse_sizes(sequence_length: int, batch_size: int, seed: int, num_workers: int, num_proc: int | None) -> None:
    """Raises ValueError if an argument of a data module is below the least that there can be."""
    least = {"sequence_length": 2, "batch_size": 1, "seed": 0, "num_workers": 0, "num_proc": 1}
    given = (sequence_length, batch_size, seed, num_workers, num_proc)
    for (name, smallest), value in zip(least.items(), given, strict=True):
        if value is not None and value < smallest:
            raise ValueError(f"{name}={value} must be at least {smallest}.")


def prepare(
    directory: Path,
    parts: Sequence[Part],
    make_samples: MakeSamples,
    sequence_length: int,
    pad_token_id: int,
    num_proc: int,
    shuffle_seed: int | None,
    description: str,
    pack: bool = True,
) -> None:
    """Write windows of the documents that rows become, and what was counted.

    The windows do not depend on ``num_proc``. Documents longer than a window, and those of which no token is
    supervised, are left out and counted.

    Args:
        directory: An existing directory, in which `WINDOWS` and `COUNTS` are made.
        parts: The rows.
        make_samples: What they become. It is called in processes that are forked from this one, so it may hold
            anything, but must not touch a GPU.
        sequence_length: Tokens of a window.
        pad_token_id: What fills windows up.
        num_proc: Processes; 1 is this one.
        shuffle_seed: Mixes the documents of all parts before they are packed, and repeats them as the sources' weights
            say. None leaves each where it is, once, in windows that hold documents of one source each: source by
            source, as many as `COUNTS` says.
        description: What the progress bar says.
        pack: Let documents share windows.
    """
    counts = Counts()
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        with DocumentFiles(Path(scratch), directory) as writer:
            for part, made in made_of(parts, make_samples, sequence_length, num_proc, description):
                writer.add(made.tokens, made.supervised, made.lengths, made.media, made.numbers, part)
                counts.add(made, parts[part].rows.name)
        documents = writer.documents()
        if shuffle_seed is not None:
            orders = [documents.mixed([part.rows.weight for part in parts], shuffle_seed)]
        else:
            numbers = {name: [n for n, part in enumerate(parts) if part.rows.name == name] for name in counts.sources}
            orders = [np.flatnonzero(np.isin(documents.parts, of_name)) for of_name in numbers.values()]
        fill, windows = _pack(directory / WINDOWS, documents, orders, sequence_length, pad_token_id, pack)
        if shuffle_seed is None:
            for some, number in zip(counts.sources.values(), windows, strict=True):
                some["windows"] = number
    shares = {"fill_rate": fill.fill_rate, "supervised_share": fill.supervised_share}
    (directory / COUNTS).write_text(json.dumps({**vars(fill), **shares, **vars(counts)}, indent=1))


# --------------------------------------------------------------------------------------------------- rows to documents


@dataclass
class Made:
    """What rows became, as it travels from a worker.

    Attributes:
        rows: Number of rows.
        tokens: int32, one document after the other.
        supervised: bool, of each token.
        lengths: int64, of each document.
        media: The images and clips of all documents, in order.
        numbers: int64, how many each document has.
        dropped: As in `Samples`.
        notes: As in `Samples`.
    """

    rows: int
    tokens: np.ndarray
    supervised: np.ndarray
    lengths: np.ndarray
    media: list[Medium]
    numbers: np.ndarray
    dropped: Counter[str]
    notes: Counter[str]

    @staticmethod
    def of(samples: Samples, rows: int, sequence_length: int) -> Made:
        """What is kept of samples: documents that a window holds, and that have a token to predict."""
        kept, media = [], []
        for sample, of_sample in zip(samples.samples, samples.media, strict=True):
            if len(sample.input_ids) > sequence_length:
                samples.drop(f"longer than {sequence_length} tokens")
            elif not any(sample.supervised[1:]):
                samples.drop("without supervised tokens")
            else:
                kept.append(sample)
                media.append(of_sample)
        return Made(
            rows,
            np.fromiter(chain.from_iterable(sample.input_ids for sample in kept), np.int32),
            np.fromiter(chain.from_iterable(sample.supervised for sample in kept), np.bool_),
            np.array([len(sample.input_ids) for sample in kept], np.int64),
            [medium for of_sample in media for medium in of_sample],
            np.array([len(of_sample) for of_sample in media], np.int64),
            samples.dropped,
            samples.notes,
        )


@dataclass(frozen=True)
class _Work:
    """What every worker knows, since it is forked from the process that does."""

    parts: Sequence[Part]
    make_samples: MakeSamples
    sequence_length: int

    def tasks(self) -> list[tuple[int, int, int]]:
        """Runs of rows, as (part, begin, end): the same however many processes there are."""
        return [
            (number, begin, min(begin + part.rows.rows_per_task, len(part.indices)))
            for number, part in enumerate(self.parts)
            for begin in range(0, len(part.indices), part.rows.rows_per_task)
        ]

    def do(self, task: tuple[int, int, int]) -> Made:
        number, begin, end = task
        part, samples = self.parts[number], Samples()
        self.make_samples(part.rows.read(part.indices[begin:end].tolist()), samples)
        return Made.of(samples, end - begin, self.sequence_length)


_work: _Work | None = None  # in worker processes


def _begin_worker(work: _Work) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process is a thread's worth; and its warning of forks is gone
    torch.set_num_threads(1)  # OpenMP's threads are not in a fork: images would wait for them


def _do(task: tuple[int, int, int]) -> Made:
    assert _work is not None
    return _work.do(task)


def made_of(
    parts: Sequence[Part], make_samples: MakeSamples, sequence_length: int, num_proc: int, description: str
) -> Iterator[tuple[int, Made]]:
    """What each task's rows became, in the order of the rows, with the number of its part."""
    work = _Work(parts, make_samples, sequence_length)
    tasks = work.tasks()
    num_proc = min(num_proc, len(tasks))
    total = sum(len(part.indices) for part in parts)
    with ExitStack() as stack:
        # Not where nobody watches: a log would get a line for every update.
        bar = stack.enter_context(tqdm(total=total, desc=description, unit=" rows", disable=None, mininterval=0.5))
        results: Iterator[Made] = map(work.do, tasks)
        if num_proc > 1:
            # Forked, as DataLoader's workers are: what makes samples need not be picklable, and rows are shared.
            context = multiprocessing.get_context("fork")
            pool = ProcessPoolExecutor(num_proc, context, _begin_worker, (work,))
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(_do, tasks)
        for (number, _, _), made in zip(tasks, results, strict=True):
            bar.update(made.rows)
            yield number, made


@dataclass
class Counts:
    """What is said of rows that became windows."""

    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, made: Made, source: str) -> None:
        """Counts what rows of a source became."""
        counts = self.sources.setdefault(source, {"rows": 0, "documents": 0, "tokens": 0})
        counts["rows"] += made.rows
        counts["documents"] += len(made.lengths)
        counts["tokens"] += number_of_tokens(made.tokens)
        self.dropped.update(made.dropped)
        self.notes.update(made.notes)

    def rows(self, source: str) -> int:
        """Rows of a source so far."""
        return self.sources.get(source, {"rows": 0})["rows"]


def describe(counts: dict[str, Any]) -> str:
    """One line on windows or documents, from what was counted."""
    documents, tokens = (sum(some[what] for some in counts["sources"].values()) for what in ("documents", "tokens"))
    line = f"{documents:,} documents ({tokens:,} tokens)"
    if "windows" in counts:
        line = (
            f"{counts['documents']:,} documents ({counts['tokens']:,} tokens) in {counts['windows']:,} windows of "
            f"{counts['sequence_length']:,}, {counts['fill_rate']:.1%} full; {counts['supervised_share']:.1%} of the "
            "tokens are supervised"
        )
    if len(counts["sources"]) > 1:
        line += "; from " + ", ".join(f"{name} ({some['documents']:,})" for name, some in counts["sources"].items())
        line += ", before their weights" if counts.get("documents", documents) != documents else ""
    if counts["dropped"]:
        line += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts["dropped"].items()))
    if counts["notes"]:
        line += "; " + ", ".join(f"{count:,} {what}" for what, count in sorted(counts["notes"].items()))
    return line


# ------------------------------------------------------------------------------------------------- documents to windows


def _pack(
    path: Path,
    documents: Documents,
    orders: Sequence[np.ndarray],
    sequence_length: int,
    pad_token_id: int,
    pack: bool,
) -> tuple[Fill, list[int]]:
    """Write the windows as an Arrow stream, which `datasets.Dataset.from_file` maps into memory.

    Returns:
        What is in them, and how many there are of each of the orders, whose documents share no windows.
    """
    fill, numbers = Fill(sequence_length), []
    values = pa.list_(pa.int32(), sequence_length)
    media_type = pa.list_(pa.list_(pa.int64()))  # of each document its own
    schema = pa.schema([(name, values) for name in COLUMNS])
    if documents.have_media:
        schema = schema.append(pa.field("media", media_type))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for order in orders:
            before, lengths = fill.windows, documents.lengths[order]
            windows = best_fit(lengths, sequence_length) if pack else iter([[place] for place in range(len(order))])
            while batch := list(islice(windows, _WINDOWS_PER_WRITE)):
                filled, media = [], []
                for places in batch:
                    indices = order[places].tolist()
                    chosen = [documents[index] for index in indices]
                    filled.append(fill_window(chosen, sequence_length, pad_token_id))
                    media.append([list(documents.media(index)) for index in indices])
                    fill.add(filled[-1], len(chosen), sum(number_of_tokens(sample.input_ids) for sample in chosen))
                columns = [pa.array(np.concatenate(column)) for column in zip(*filled, strict=True)]
                arrays = [pa.FixedSizeListArray.from_arrays(column, sequence_length) for column in columns]
                arrays += [pa.array(media, media_type)] if documents.have_media else []
                stream.write_batch(pa.record_batch(arrays, schema=schema))
            numbers.append(fill.windows - before)
    return fill, numbers
