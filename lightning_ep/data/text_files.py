"""Texts in files, read row by row as they are asked for: each file for itself, and of a row one column.

`datasets` has readers of its own, which take the columns of all files from the first rows of the first one, and end
with an error where others have more of them.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_ep.data.conversations import half_of_a_character
from lightning_ep.data.row_files import Row, holds_a_list, is_of_the_disk, json_row, object_row, open_parquet

if TYPE_CHECKING:
    import datasets
    from pyarrow import DataType, RecordBatch
    from pyarrow.parquet import ParquetFile

PASSED_OVER = "lightning_ep: passed over"
"""The one key of a row that has no text, with its `PassedOver`."""

_BATCH = 256
"""Rows of a parquet file that become Python's at once."""


class PassedOver(NamedTuple):
    """Why a row has no text.

    It is a row nevertheless, so that places are counted alike, and just one data rank has it and tells of it.

    Attributes:
        file: Its file.
        what: Its file and line, and what is wrong.
        readable: Whether only the column is missing, or something else than a text stands in it.
    """

    file: str
    what: str
    readable: bool


def stream_files(files: list[Path], column: str) -> datasets.IterableDataset:
    """The rows of files that end with one of `KINDS`, of which ranks may have files of their own.

    A row is ``{column: text}``, with None where the file says null, or has the key `PASSED_OVER`.
    """
    from datasets import IterableDataset

    # A list is what `datasets` divides among ranks, and along which it counts a place.
    return IterableDataset.from_generator(_rows, gen_kwargs={"files": [str(file) for file in files], "column": column})


def refuse_unreadable(file: Path) -> None:
    """Sees, without reading it, that a file can be read.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is a parquet file that is none, or is not whole.
    """
    if file.suffix == ".parquet":
        open_parquet(file).close()
    else:
        file.open("rb").close()


def no_text(column: str, row: Mapping[str, Any]) -> str:
    """Says that a row has no text in this column, and what it has."""
    kinds = {key: type(value).__name__ for key, value in row.items()}
    return f"the column {column!r} must be a text, and the row has {kinds}. Name the column with `column`."


def _rows(files: list[str], column: str) -> Iterator[dict[str, Any]]:
    for file in files:
        for row in KINDS[Path(file).suffix](Path(file), column):
            yield _kept(file, column, row)


def _kept(file: str, column: str, row: Row) -> dict[str, Any]:
    """What the stream has of a row."""
    if row.malformed is not None:
        return {PASSED_OVER: PassedOver(file, f"{row.where}: {row.malformed}", False)}
    if column not in row.values or not isinstance(row.values[column], str | None):
        return {PASSED_OVER: PassedOver(file, f"{row.where}: {no_text(column, row.values)}", True)}
    return {column: row.values[column]}


# --------------------------------------------------------------------------------------------------------------- JSON


def _json_rows(file: Path, column: str) -> Iterator[Row]:
    problem = partial(_problem_of_text, column)
    return _items(file, problem) if holds_a_list(file) else _lines(file, problem)


def _lines(file: Path, problem: Callable[[Mapping[str, Any]], str | None]) -> Iterator[Row]:
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            if text := line.removeprefix(BOM_UTF8).rstrip():
                yield json_row(file, number, text, problem)


def _items(file: Path, problem: Callable[[Mapping[str, Any]], str | None]) -> Iterator[Row]:
    try:
        items = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # JSON or UTF-8; numbers and depths that Python refuses
        yield Row(str(file), {}, f"it begins as a list, and is no JSON: {error}.")
        return
    for number, item in enumerate(items):
        yield object_row(f"{file}, item {number}", item, file.parent, problem)


def _problem_of_text(column: str, row: Mapping[str, Any]) -> str | None:
    text = row.get(column)
    try:
        if isinstance(text, str):
            text.encode()  # much faster than to look for what is wrong
    except UnicodeEncodeError:
        return half_of_a_character(text)
    return None


# ------------------------------------------------------------------------------------------------------ other formats


def _documents(file: Path, _: str) -> Iterator[Row]:
    """The one row of a text file, in the column "text"; none of an empty one."""
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        yield Row(f"{file}:{line}", {}, f"the file is no UTF-8: {error}.")
        return
    if text:
        yield Row(str(file), {"text": text.replace("\r\n", "\n").replace("\r", "\n")})


def _parquet_rows(file: Path, column: str) -> Iterator[Row]:
    with open_parquet(file) as opened:
        names = opened.schema_arrow.names
        if column in names and _is_text(opened.schema_arrow.types[names.index(column)]):
            yield from _rows_of_groups(file, opened, [column], _BATCH)
        else:
            yield from islice(_rows_of_groups(file, opened, None, 1), 1)  # all are like the first


def _is_text(kind: DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(of(kind) for of in (types.is_string, types.is_large_string, types.is_string_view, types.is_null))


def _rows_of_groups(file: Path, opened: ParquetFile, columns: list[str] | None, size: int) -> Iterator[Row]:
    """Rows, so many of which are made at once; what is damaged of a row group is one row."""
    from pyarrow import ArrowException

    begin = 0
    for group in range(opened.num_row_groups):
        row = begin
        try:
            # Without threads, since a process that reads ahead is forked.
            for batch in opened.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
                for values, malformed in _rows_of_batch(batch):
                    yield Row(f"{file}, row {row}", values, malformed)
                    row += 1
        except (ArrowException, OSError) as error:
            if is_of_the_disk(error):
                raise
            yield Row(f"{file}, row {row}", {}, f"this and the rest of its row group is damaged: {error}.")
        begin += opened.metadata.row_group(group).num_rows


def _rows_of_batch(batch: RecordBatch) -> Iterator[tuple[dict[str, Any], str | None]]:
    """The values of each row, or what is wrong with it: Arrow does not look at texts before they become Python's."""
    try:
        yield from ((values, None) for values in batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows > 1:
            for index in range(batch.num_rows):
                yield from _rows_of_batch(batch.slice(index, 1))
        else:
            yield {}, f"a text is no UTF-8: {error}."


KINDS = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".txt": _documents,
}
"""How files are read that end so."""
