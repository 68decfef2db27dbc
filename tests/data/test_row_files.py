"""Rows of JSON lines, parquet and datasets: each alone, and each with its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from lightning_ep.data.conversations import MalformedRow, conversation
from lightning_ep.data.row_files import Source, open_source
from lightning_ep.data.text_stream import open_stream
from tests.data.loopback_hub import REPOSITORY, loopback_hub

# Columns whose structs have other keys in every row: Arrow gives all of them all keys.
ROWS = [
    {
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 2}}]},
            {"role": "tool", "content": "4"},
        ],
        "tools": [{"name": "add", "parameters": {"a": {"type": "integer"}, "b": {"type": "integer"}}}],
    },
    {
        "messages": [
            {"role": "user", "content": "Hot?"},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]},
            {"role": "tool", "content": "No"},
            {"role": "assistant", "content": "No.", "reasoning_content": "It is not."},
        ],
        "tools": [{"name": "weather", "parameters": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}}}],
    },
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def meant(source: str | Source) -> list[Any]:
    rows = open_source(source)
    return [conversation(row.columns(), "")[:3] for row in rows.read(range(rows.count))]


def write(kind: str, directory: Path) -> str:
    if kind == "json lines":
        return str(write_lines(directory / "chats.jsonl", ROWS))
    if kind == "a json list":
        (directory / "chats.json").write_text(json.dumps(ROWS, indent=1))
        return str(directory / "chats.json")
    if kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(str(directory / "chats.parquet"), batch_size=2)
        return str(directory / "chats.parquet")
    if kind == "a directory":
        write_lines(directory / "a.jsonl", ROWS[:2])
        Dataset.from_list(ROWS[2:]).to_parquet(str(directory / "b.parquet"))
        return str(directory)
    if kind == "a pattern":
        write_lines(directory / "a.jsonl", ROWS[:2])
        write_lines(directory / "b.jsonl", ROWS[2:])
        return str(directory / "*.jsonl")
    dataset = Dataset.from_list(ROWS)
    (DatasetDict({"train": dataset}) if kind == "a dict of datasets" else dataset).save_to_disk(directory)
    return str(directory)


KINDS = ["json lines", "a json list", "parquet", "a directory", "a pattern", "a dataset", "a dict of datasets"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_means_the_same_whatever_holds_it_and_whichever_rows_are_beside_it(kind: str, tmp_path: Path) -> None:
    assert meant(write(kind, tmp_path)) == [conversation(row, "")[:3] for row in ROWS]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_read_in_any_order(kind: str, tmp_path: Path) -> None:
    rows = open_source(write(kind, tmp_path))
    assert [row.values for row in rows.read([2, 0, 2])] == [rows.read([index])[0].values for index in (2, 0, 2)]


def test_a_row_knows_its_line(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('\n{"messages": []}\n\n  \n{"messages": [}\n"Hi"\n')
    rows = open_source(str(file)).read([0, 1, 2])
    assert [row.where for row in rows] == [f"{file}:2", f"{file}:5", f"{file}:6"]
    assert rows[0].columns() == {"messages": []}
    with pytest.raises(MalformedRow, match=r"chats.jsonl:5: the line is no JSON"):
        rows[1].columns()
    with pytest.raises(MalformedRow, match=r"chats.jsonl:6: a row is an object with columns.*not str"):
        rows[2].columns()


def test_a_line_that_is_no_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(MalformedRow, match=r"chats.jsonl:1: the line is no JSON.*utf-8"):
        open_source(str(tmp_path)).read([0])[0].columns()


@pytest.mark.parametrize(
    "row", ['{"messages": "\\ud83d"}', '{"messages": ' + "1" * 5000 + "}", '{"messages": ' + "[" * 99_999]
)
def test_what_python_or_tokenizers_cannot_read_is_told(row: str, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text(f'{{"messages": "\\ud83d\\ude00"}}\n{row}\n')
    whole, other = open_source(str(tmp_path / "chats.jsonl")).read([0, 1])
    assert whole.columns() == {"messages": "\U0001f600"}
    with pytest.raises(MalformedRow, match=r"chats.jsonl:2: (a text has '\\ud83d', which is half|the line is no JSON)"):
        other.columns()
    (tmp_path / "chats.json").write_text(f"[{row}]")
    with pytest.raises(MalformedRow, match=r"chats.json.*(which is half|is no JSON)"):
        open_source(str(tmp_path / "chats.json")).read([0])[0].columns()


def test_half_a_character_in_json_text_is_told() -> None:
    with pytest.raises(MalformedRow, match=r"chats.jsonl:1: messages: a text has '\\udc00', which is half"):
        conversation({"messages": r'[{"role": "user", "content": "\udc00"}]'}, "chats.jsonl:1")


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more"])
def test_a_broken_parquet_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "chats.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"chats.parquet is no parquet, or not whole: "):
        open_source(str(tmp_path))


def test_the_fingerprint_follows_the_contents(tmp_path: Path) -> None:
    for kind in ("json lines", "parquet", "a dataset"):
        prints = []
        for number, rows in enumerate((ROWS, ROWS, ROWS[:2])):
            directory = tmp_path / f"{kind}{number}"
            directory.mkdir()
            if kind == "json lines":
                write_lines(directory / "chats.jsonl", rows)
            elif kind == "parquet":
                Dataset.from_list(rows).to_parquet(str(directory / "chats.parquet"))
            else:
                Dataset.from_list(rows).save_to_disk(directory)
            prints.append(open_source(str(directory)).fingerprint.replace(str(directory), ""))
        assert prints[0] == prints[1] != prints[2]


def test_a_source_may_be_cut_short(tmp_path: Path) -> None:
    path = str(write_lines(tmp_path / "chats.jsonl", ROWS))
    assert open_source(Source(path, max_rows=2)).count == 2
    assert open_source(Source(path, max_rows=9)).count == 3
    with pytest.raises(ValueError, match=r"max_rows=0 must be at least 1"):
        open_source(Source(path, max_rows=0))


@pytest.mark.parametrize("read", [open_source, open_stream])
def test_a_split_that_is_not_there_is_no_other(read: Any, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    write_lines(tmp_path / "files" / "test.jsonl", ROWS)
    for asked in ({"split": "test"}, {"subset": "easy"}):
        with pytest.raises(ValueError, match=r"files is read as files, and (split='test'|subset='easy') is of data"):
            read(Source(str(tmp_path / "files"), **asked))
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"one is one dataset without splits, and so has no 'test'"):
        read(Source(str(tmp_path / "one"), split="test"))
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"two has the splits \['test', 'train'\], and no 'dev'"):
        read(Source(str(tmp_path / "two"), split="dev"))
    Dataset.from_list(ROWS, split="test").save_to_disk(tmp_path / "named")
    read(Source(str(tmp_path / "named"), split="test"))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no .*chats.jsonl.*JSON lines or parquet.*'owner/name'"):
        open_source(str(tmp_path / "chats.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"has no files that end with .jsonl"):
        open_source(str(tmp_path))
    (tmp_path / "chats.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"chats.csv is of no kind that is read: JSON lines"):
        open_source(str(tmp_path / "chats.csv"))
    (tmp_path / "chats.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no rows"):
        open_source(str(tmp_path / "chats.jsonl"))
    DatasetDict({"test": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"has the splits \['test'\], and no 'train'"):
        open_source(str(tmp_path / "saved"))


def test_other_names_are_those_of_datasets_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    Dataset.from_list(ROWS).save_to_disk(tmp_path)

    def load_dataset(name: str, subset: str | None, split: str) -> Dataset:
        asked.append((name, subset, split))
        return datasets.load_from_disk(str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = open_source(Source("owner/name", split="test", subset="all"))
    assert asked == [("owner/name", "all", "test")]
    assert rows.read([1])[0].where == "owner/name, test, row 1"


def test_rows_of_the_hub_mean_what_they_mean_in_a_file(tmp_path: Path) -> None:
    program = f"""if True:
        import json, os, shutil
        from lightning_ep.data.row_files import open_source

        for node in range(2):  # what several nodes prepare is the same to the cache of windows
            rows = open_source("{REPOSITORY}")
            print(json.dumps([rows.fingerprint, [row.values for row in rows.read(range(rows.count))]]))
            shutil.rmtree(os.path.join(os.environ["HF_HOME"], "datasets"))
    """
    with loopback_hub({"train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode()}) as address:
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", program]
        ran = subprocess.run(command, env=os.environ | hub, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    first, second = map(json.loads, ran.stdout.splitlines()[-2:])
    assert first == second
    assert [conversation(row, "")[:3] for row in first[1]] == [conversation(row, "")[:3] for row in ROWS]


@pytest.mark.parametrize("name", ["chats.json", "chats.jsonl"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    text = json.dumps(ROWS) if name == "chats.json" else "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert meant(str(tmp_path / name)) == [conversation(row, "")[:3] for row in ROWS]
