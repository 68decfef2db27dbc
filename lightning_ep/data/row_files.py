"""Files and datasets that hold a row per sample, and where in them each row is.

JSON is read line by line and goes through no Arrow: Arrow would give every struct of a column the keys of all rows,
with None in them, so that what one row says would depend on the others. Where rows come from Arrow files (parquet,
datasets of the hub), such keys are taken out again.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from lightning_ep.data.conversations import MalformedRow, half_of_a_character
from lightning_ep.data.preparation import Rows

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow.parquet import ParquetFile

_JSON = (".jsonl", ".ndjson", ".json")


class Row(NamedTuple):
    """One row: its columns, or why it has none.

    Attributes:
        where: File and line, or source and row.
        values: The columns.
        malformed: What is wrong where it is no dict of columns.
        folder: The directory of the file, from which paths in a row go on; None of a dataset.
    """

    where: str
    values: Mapping[str, Any]
    malformed: str | None = None
    folder: Path | None = None

    def columns(self) -> Mapping[str, Any]:
        """The columns.

        Raises:
            MalformedRow: If it has none.
        """
        if self.malformed:
            raise MalformedRow(f"{self.where}: {self.malformed}")
        return self.values


@dataclass(frozen=True)
class Source:
    """Where rows come from, and how much of them.

    Args:
        path: A file of JSON lines (.jsonl; .json may hold one list, too) or parquet, a glob pattern of such files
            (quoted) or a directory of them, a directory that `datasets` has saved, or a dataset's name on the hub.
        weight: How often each row comes in an epoch: 2 is twice, 0.5 a random half of them once.
        split: Which split of a dataset; files have none.
        subset: Which of a hub dataset's subsets (configurations), where it has several.
        max_rows: Take this many at most, from the front.
        name: What the log calls it, in ``val/loss/<name>`` for example. Default: its path. Sources of one name are
            counted and validated together.
    """

    path: str
    weight: float = 1.0
    split: str = "train"
    subset: str | None = None
    max_rows: int | None = None
    name: str | None = None


def open_source(source: str | Source) -> Rows:
    """Find the rows of a source; they are read when they are asked for.

    Returns:
        Rows whose ``read`` gives a list of `Row`.

    Raises:
        FileNotFoundError: If there is nothing of that name.
        ValueError: If a file is of no known kind, or there are no rows.
    """
    source = Source(source) if isinstance(source, str) else source
    table, count = _table(source)
    return Rows(source.name or source.path, count, table.fingerprint, table.read, source.weight)


def first_rows(source: str | Source, most: int) -> Rows:
    """The first rows of a source, so many at most, found without reading what follows them; with no fingerprint."""
    source = Source(source) if isinstance(source, str) else source
    source = replace(source, max_rows=most if source.max_rows is None else min(most, source.max_rows))
    table, count = _table(source)
    return Rows(source.name or source.path, count, "", table.read, source.weight)


def _table(source: Source) -> tuple[_Table, int]:
    """Where the rows are, and how many of them are wanted."""
    most = source.max_rows
    if most is not None and most < 1:
        raise ValueError(f"{source.path}: max_rows={most} must be at least 1. Leave the source out instead.")
    if files := _files(source.path):
        refuse_split_of_files(source)
        tables, found = [], 0
        for file in files:
            if most is None or found < most:
                tables.append(_open(file, None if most is None else most - found))
                found += len(tables[-1])
        table: _Table = _Files(tables)
    else:
        table = _Dataset.of(source)
    count = len(table) if most is None else min(len(table), most)
    if not count:
        raise ValueError(f"{source.path!r} has no rows.")
    return table, count


class _Table(Protocol):
    def __len__(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def read(self, indices: Sequence[int]) -> list[Row]: ...


def _files(path: str) -> list[Path]:
    """The files that a path means; none if it is a dataset's."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        if (place / "dataset_info.json").exists() or (place / "dataset_dict.json").exists():
            return []
        files = sorted(file for file in place.rglob("*") if file.suffix in (*_JSON, ".parquet"))
        if not files:
            raise FileNotFoundError(f"{place} has no files that end with {', '.join(_JSON)} or .parquet.")
        return files
    files = sorted(Path(file) for file in glob.glob(str(place), recursive=True))
    if not files and (path.count("/") != 1 or path.startswith((".", "~", "/")) or place.suffix in (*_JSON, ".parquet")):
        raise FileNotFoundError(
            f"There is no {place.absolute()}. Give a file of JSON lines or parquet, a directory or a quoted pattern "
            "such as 'chats/*.jsonl', or the name of a dataset on the hub, 'owner/name'."
        )
    return files


def _open(file: Path, most: int | None) -> _Table:
    """A file, of which rows behind so many will not be asked for."""
    if file.suffix in _JSON:
        return _JsonList(file) if holds_a_list(file) else _JsonLines(file, most)
    if file.suffix == ".parquet":
        return _Parquet(file)
    raise ValueError(f"{file} is of no kind that is read: JSON lines ({', '.join(_JSON)}) and parquet are.")


def holds_a_list(file: Path) -> bool:
    """Whether a file is JSON that begins as one list, and not as lines."""
    if file.suffix != ".json":
        return False
    with file.open("rb") as opened:
        return opened.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def open_parquet(file: Path) -> ParquetFile:
    """A parquet file, of which only what stands at its end is read.

    Raises:
        ValueError: If it is none, or not whole.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file)
    except (ArrowException, OSError) as error:  # which name no file
        if is_of_the_disk(error):
            raise
        raise ValueError(f"{file} is no parquet, or not whole: {error}") from error


def is_of_the_disk(error: Exception) -> bool:
    """Whether an error of Arrow is one of reading the file, not of what stands in it."""
    return isinstance(error, OSError) and error.errno is not None


class _Files:
    """Several files, one after the other."""

    def __init__(self, tables: list[_Table]) -> None:
        self._tables = tables
        self._ends = np.cumsum([len(table) for table in tables]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def fingerprint(self) -> str:
        return " ".join(table.fingerprint for table in self._tables)

    def read(self, indices: Sequence[int]) -> list[Row]:
        places = [bisect_right(self._ends, index) for index in indices]
        rows: dict[int, Row] = {}
        for place in sorted(set(places)):
            inside = [index for index, other in zip(indices, places, strict=True) if other == place]
            begin = self._ends[place] - len(self._tables[place])
            found = self._tables[place].read([index - begin for index in inside])
            rows |= dict(zip(inside, found, strict=True))
        return [rows[index] for index in indices]


class _JsonLines:
    """A file with an object in every line that is not empty."""

    def __init__(self, file: Path, most: int | None = None) -> None:
        self._file = file
        digest, begin = hashlib.sha256(), 0
        begins: list[int] = []
        lines: list[int] = []
        with file.open("rb") as opened:
            for number, line in enumerate(opened, 1):
                if len(lines) == most:
                    break
                digest.update(line)
                if not line.isspace():
                    begins.append(begin)
                    lines.append(number)
                begin += len(line)
        self._begins, self._lines = np.array(begins, np.int64), np.array(lines, np.int64)
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, indices: Sequence[int]) -> list[Row]:
        rows = []
        with self._file.open("rb") as opened:
            for index in indices:
                opened.seek(int(self._begins[index]))
                rows.append(json_row(self._file, int(self._lines[index]), opened.readline()))
        return rows


class _JsonList:
    """A file with one list of objects. It is kept in memory."""

    def __init__(self, file: Path) -> None:
        content = file.read_bytes()
        self._file, self.fingerprint = file, hashlib.sha256(content).hexdigest()[:16]
        try:
            self._rows = json.loads(content)
        except (ValueError, RecursionError) as error:  # JSON or UTF-8; numbers and depths that Python refuses
            raise MalformedRow(f"{file} begins as a list, and is no JSON: {error}") from error

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int]) -> list[Row]:
        return [object_row(f"{self._file}, item {index}", self._rows[index], self._file.parent) for index in indices]


class _Parquet:
    def __init__(self, file: Path) -> None:
        self._file, self._groups = file, open_parquet(file)
        groups = range(self._groups.num_row_groups)
        self._ends = np.cumsum([self._groups.metadata.row_group(group).num_rows for group in groups]).tolist() or [0]
        self._last: tuple[int, Any] = (-1, None)  # the group that was read last

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def fingerprint(self) -> str:
        return _hash_of([self._file])

    def read(self, indices: Sequence[int]) -> list[Row]:
        rows = []
        for index in indices:
            group = bisect_right(self._ends, index)
            if self._last[0] != group:
                self._last = (group, self._groups.read_row_group(group, use_threads=False))
            table = self._last[1]
            values = table.slice(index - self._ends[group] + len(table), 1).to_pylist()[0]
            rows.append(Row(f"{self._file}, row {index}", without_fills(values), folder=self._file.parent))
        return rows


class _Dataset:
    """A dataset of `datasets`, saved in a directory or from the hub."""

    def __init__(self, name: str, dataset: Dataset) -> None:
        self._name, self._dataset = name, dataset.with_format(None)

    @staticmethod
    def of(source: Source) -> _Dataset:
        from datasets import load_dataset

        if Path(source.path).expanduser().is_dir():
            dataset = saved_dataset(source)
        else:
            dataset = load_dataset(source.path, source.subset, split=source.split)
        return _Dataset(f"{source.path}, {source.split}", dataset)

    def __len__(self) -> int:
        return len(self._dataset)

    @cached_property
    def fingerprint(self) -> str:
        return _hash_of([Path(file["filename"]) for file in self._dataset.cache_files]) + self._name

    def read(self, indices: Sequence[int]) -> list[Row]:
        if re.search(r"\b(Image|Audio)\(", repr(self._dataset.features)):  # as files have them, not decoded
            rows = self._dataset.with_format("arrow")[list(indices)].to_pylist()
        else:
            columns = self._dataset[list(indices)]
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [Row(f"{self._name}, row {index}", without_fills(row)) for index, row in zip(indices, rows, strict=True)]


def refuse_split_of_files(source: Source) -> None:
    """Raises ValueError if a split or a subset is asked of files, all of which would be read."""
    if source.split != Source.split or source.subset is not None:
        asked = f"split={source.split!r}" if source.split != Source.split else f"subset={source.subset!r}"
        raise ValueError(
            f"{source.path} is read as files, and {asked} is of datasets of the hub or saved by `datasets`. Name the "
            "files of it as `path`, such as 'data/test-*.parquet'."
        )


def saved_dataset(source: Source) -> Dataset:
    """A dataset that `datasets` has saved in a directory.

    Raises:
        ValueError: If it has no such split.
    """
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(Path(source.path).expanduser()))
    if isinstance(dataset, DatasetDict):
        if source.split not in dataset:
            raise ValueError(f"{source.path} has the splits {sorted(dataset)}, and no {source.split!r}.")
        return dataset[source.split]
    if source.split not in (Source.split, str(dataset.split)):
        raise ValueError(f"{source.path} is one dataset without splits, and so has no {source.split!r}.")
    return dataset


def without_fills(value: Any) -> Any:
    """A value without the keys, at any depth, to which Arrow gave None since other rows have them."""
    if isinstance(value, Mapping):
        return {key: without_fills(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_fills(item) for item in value]
    return value


def json_row(
    file: Path, line: int, text: bytes, problem: Callable[[Mapping[str, Any]], str | None] = half_of_a_character
) -> Row:
    """A line of JSON as a row; ``problem`` says what is wrong with the values of one, if anything is."""
    where = f"{file}:{line}"
    try:
        return object_row(where, json.loads(text.decode("utf-8-sig")), file.parent, problem)
    except json.JSONDecodeError as error:  # says "line 1" itself
        return Row(where, {}, f"the line is no JSON: {error.msg}, at column {error.colno}.")
    except (ValueError, RecursionError) as error:  # no UTF-8, or numbers and depths that Python refuses
        return Row(where, {}, f"the line is no JSON: {error}.")


def object_row(
    where: str, value: Any, folder: Path, problem: Callable[[Mapping[str, Any]], str | None] = half_of_a_character
) -> Row:
    """What JSON says as a row; for ``problem`` see `json_row`."""
    if not isinstance(value, Mapping):
        forms = "{'messages': [...]} or {'text': '...'}"
        return Row(where, {}, f"a row is an object with columns, such as {forms}, not {type(value).__name__}.")
    return Row(where, value, problem(value), folder)


def _hash_of(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
