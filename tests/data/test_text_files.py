"""Rows of text files: each is read for itself, and one that cannot be read is told and is no end."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from lightning_ep.data import Source
from lightning_ep.data.text_files import PASSED_OVER
from lightning_ep.data.text_stream import open_stream


def read(path: Path) -> list[Any]:
    """The texts, and what is said of rows that have none."""
    rows = list(open_stream(Source(str(path)), "body"))
    return [row[PASSED_OVER].what if PASSED_OVER in row else row["body"] for row in rows]


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    if file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(file), batch_size=10)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_may_have_other_columns(kind: str, tmp_path: Path) -> None:
    write(tmp_path / f"a.{kind}", [{"body": f"a{i}", "id": i} for i in range(25)])
    write(tmp_path / f"b.{kind}", [{"id": str(i), "new": {"x": i}, "body": f"b{i}"} for i in range(25)])
    (tmp_path / f"c.{kind}").write_bytes(b"") if kind == "jsonl" else parquet.write_table(
        pa.table({"body": pa.array([], pa.string())}), tmp_path / "c.parquet"
    )
    assert read(tmp_path) == [f"{name}{i}" for name in "ab" for i in range(25)]


def test_a_key_may_come_late_in_a_file(tmp_path: Path) -> None:
    rows = [{"body": "x" * 2_000_000}] * 6  # a reader that takes columns from a chunk has one of 10 MB
    write(tmp_path / "long.jsonl", [*rows, {"new": [1], "body": "late"}])
    assert [text[:4] for text in read(tmp_path / "long.jsonl")] == ["xxxx"] * 6 + ["late"]


def test_lines_that_cannot_be_read_are_told_by_line(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"body": "first"}',
        b'{"body": "cut',
        b"[1, 2]",
        b'{"body": "\xff"}',
        rb'{"body": "half \ud83d"}',
        rb'{"body": "whole \ud83d\ude00", "other": "half \ud83d"}',
        b"  ",
        b'{"body": ' + b"[" * 100_000,
        b'{"body": null}\r',
        b'{"text": "elsewhere"}',
        b'{"body": 3, "text": "elsewhere"}',
        b'\xef\xbb\xbf{"body": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = read(tmp_path / "a.jsonl")
    assert [found[i] for i in (0, 5, 7, 10)] == ["first", "whole 😀", None, "last"]
    said = {2: "no JSON: Unt", 3: "a row is an", 4: "no JSON: 'utf-8' codec", 5: "a text has '", 8: "no JSON: maximum"}
    said |= {10: "must be a text, and the row has {'text': 'str'}", 11: "the row has {'body': 'int', 'text': 'str'}"}
    told = [text for i, text in enumerate(found) if i not in (0, 5, 7, 10)]
    for (line, what), text in zip(said.items(), told, strict=True):
        assert text.startswith(f"{tmp_path}/a.jsonl:{line}: ")
        assert what in text


def test_a_list_is_read_by_item(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf [{"body": "first"}, 3, {"body": "last", "new": 1}]')
    (tmp_path / "b.json").write_text('[{"body": "cut')
    (tmp_path / "c.json").write_text('{"body": "of lines"}\n')
    first, item, last, cut, lines = read(tmp_path)
    assert (first, last, lines) == ("first", "last", "of lines")
    assert item.startswith(f"{tmp_path}/a.json, item 1: a row is an object")
    assert cut.startswith(f"{tmp_path}/b.json: it begins as a list, and is no JSON: Unterminated")


def test_text_files_are_documents(tmp_path: Path) -> None:
    for name, content in {"a": b"\xef\xbb\xbfone\r\ntwo\n", "b": b"", "c": b"one\ntw\xff", "d": b"last"}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    first, told, last = [row.get("text", row.get(PASSED_OVER)) for row in open_stream(Source(str(tmp_path)))]
    assert (first, last) == ("one\ntwo\n", "last")
    assert told.what.startswith(f"{tmp_path}/c.txt:2: the file is no UTF-8: 'utf-8' codec can't decode byte 0xff")
    assert "'body' must be a text, and the row has {'text': 'str'}" in read(tmp_path)[0]


def test_what_is_damaged_in_a_parquet_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write(file, [{"body": f"a{i}"} for i in range(30)])
    begin = parquet.read_metadata(file).row_group(1).column(0).dictionary_page_offset
    content = bytearray(file.read_bytes())
    content[begin : begin + 9] = b"\xff" * 9
    file.write_bytes(content)
    found = read(file)
    assert [*found[:10], *found[11:]] == [f"a{i}" for i in [*range(10), *range(20, 30)]]
    assert found[10].startswith(f"{file}, row 10: this and the rest of its row group is damaged: ")


def test_texts_of_other_kinds_and_bytes_in_a_parquet_file(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"c", None]).view(pa.utf8())
    parquet.write_table(pa.table({"body": texts}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"body": pa.array(["d"]).dictionary_encode()}), tmp_path / "b.parquet")
    parquet.write_table(pa.table({"body": pa.array(["e"], pa.large_string())}), tmp_path / "c.parquet")
    parquet.write_table(pa.table({"body": [1, 2], "text": ["x", "y"]}), tmp_path / "d.parquet")
    first, told, *others, number = read(tmp_path)
    assert [first, *others] == ["a", "c", None, "d", "e"]
    assert told.startswith(f"{tmp_path}/a.parquet, row 1: a text is no UTF-8: ")
    what = "the column 'body' must be a text, and the row has {'body': 'int', 'text': 'str'}"
    assert number.startswith(f"{tmp_path}/d.parquet, row 0: {what}"), "once, since all rows are like it"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_place_is_found_again_in_any_file(kind: str, tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.{kind}", [{"body": f"{name}{i}", name: 1} for i in range(9)])
    whole, stream = read(tmp_path), open_stream(Source(str(tmp_path)), "body")
    places = []
    for _ in stream:
        places.append(stream.state_dict())
    for done, place in enumerate(places, 1):
        again = copy.deepcopy(stream)
        again.load_state_dict(json.loads(json.dumps(place)))
        assert [row["body"] for row in again] == whole[done:]
