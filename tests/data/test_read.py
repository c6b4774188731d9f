"""Every kind of file, folder and name, and what is said of a bad one."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pyralis.data.files import HubDataset, resolve_files
from pyralis.data.read import read_rows
from pyralis.errors import DataError

ROWS = [{"text": "first 一"}, {"text": 'two\nlines, "quoted"'}, {"text": "\u2028 a line separator 😀"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def rows(files: Any, **options: Any) -> list[dict[str, Any]]:
    return [row for row, _ in read_rows(files, **options)]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_kind(name: str, folder: Path) -> Path:
    path = folder / name
    if name.endswith((".csv", ".tsv")):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writerows([["text"], *([row["text"]] for row in ROWS)])
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES.encode()))
    elif name.endswith(".zst"):
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(LINES.encode())
    elif name == "array.json":
        write(path, json.dumps(ROWS))
    elif name == "wrapped.json":
        write(path, json.dumps({"version": 1, "data": ROWS}, indent=2))
    else:
        write(path, LINES)
    return path


KINDS = ["a.jsonl", "a.ndjson", "array.json", "wrapped.json", "lines.json", "a.csv", "a.tsv", "a.parquet"]


@pytest.mark.parametrize("name", [*KINDS, "a.jsonl.gz", "a.jsonl.zst", "A.JSONL"])
def test_each_kind_of_file(name: str, tmp_path: Path) -> None:
    path = write_kind(name, tmp_path)
    read = list(read_rows(str(path)))
    assert [row for row, _ in read] == ROWS
    assert {source.file for _, source in read} == {str(path)}
    # a CSV row begins on the line behind its header, and the second one holds a line break
    lines = [2, 3, 5] if name.endswith((".csv", ".tsv")) else [1, 2, 3]
    assert [source.row for _, source in read] == lines


def test_blank_lines_and_bom(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\r\n   \n{"text": "b"}\n\n')
    assert [(row["text"], source.row) for row, source in read_rows(path)] == [("a", 1), ("b", 4)]
    assert rows(write(tmp_path / "a.csv", b"\xef\xbb\xbftext\n\nx\n")) == [{"text": "x"}]
    assert rows(write(tmp_path / "a.json", b'\xef\xbb\xbf[{"text": "x"}]')) == [{"text": "x"}]


def test_a_json_file_with_a_single_row(tmp_path: Path) -> None:
    row = {"conversation": [{"human": "a", "assistant": "b"}]}
    assert rows(write(tmp_path / "a.json", json.dumps(row))) == [row]


def test_txt_is_one_document(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.txt", "one\n\ntwo\n")) == [{"text": "one\n\ntwo\n"}]
    assert rows(write(tmp_path / "b.txt", "  \n")) == []


def test_long_cells_and_lists_in_cells(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    turns = [{"role": "user", "content": "x" * 200_000}]
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["messages", "text"], [json.dumps(turns), "[1"]])
    assert rows(path) == [{"messages": turns, "text": "[1"}]
    assert csv.field_size_limit() == limit, "the limit is csv's own, for everyone"


def test_folders_globs_and_lists(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.jsonl", "a.jsonl", ".hidden/x.jsonl"):
        write(tmp_path / name, json.dumps({"text": name}))
    write(tmp_path / "notes.md", "not data")
    in_order = ["a.jsonl", "b/1.jsonl", "b/2.jsonl"]
    assert [row["text"] for row in rows(tmp_path)] == in_order
    assert [row["text"] for row in rows(f"{tmp_path}/**/*.jsonl")] == in_order
    assert [row["text"] for row in rows([f"{tmp_path}/b", f"{tmp_path}/*.jsonl", f"{tmp_path}/a.jsonl"])] == [
        "b/1.jsonl",
        "b/2.jsonl",
        "a.jsonl",
    ]


def test_a_saved_dataset(tmp_path: Path) -> None:
    saved = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1]))
    saved.save_to_disk(tmp_path / "saved")
    assert rows(tmp_path / "saved") == ROWS
    assert rows(tmp_path / "saved", split="test") == ROWS[:1]
    with pytest.raises(DataError, match="without a split 'dev'; it has test, train"):
        rows(tmp_path / "saved", split="dev")


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_files(["owner/name", "owner/name:en", "gsm8k:main"]) == [
        HubDataset("owner/name"),
        HubDataset("owner/name", "en"),
        HubDataset("gsm8k", "main"),
    ]
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or ROWS)
    read = list(read_rows("owner/name:en", split="test", cache_dir=tmp_path))
    assert calls == [(("owner/name", "en"), {"split": "test", "cache_dir": str(tmp_path)})]
    assert [row for row, _ in read] == ROWS
    assert str(read[2][1]) == "owner/name:en:3"


def test_a_hub_dataset_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="owner/name: no such file or folder here, and as a hub dataset its split"):
        rows("owner/name")


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"Did you mean train\.jsonl\?") as caught:
        rows("data/trian.jsonl")
    assert f"looked for {tmp_path}/data/trian.jsonl" in str(caught.value)
    with pytest.raises(DataError, match="does not exist either"):
        rows("dta/sub/train.jsonl")
    # `data` is a folder here, so this is a mistyped folder and no hub dataset
    with pytest.raises(DataError, match="there is no such file or folder"):
        rows("data/sft")
    with pytest.raises(DataError, match="no data file matches this pattern"):
        rows("data/*.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file in this folder"):
        rows("empty")
    with pytest.raises(DataError, match=r"files named \*\.md are not read"):
        rows(str(write(tmp_path / "a.md", "x")))
    with pytest.raises(DataError, match="`train_file` is empty"):
        rows([])


BAD_FILES = [
    ("a.jsonl", '{"text": "a"}\n{"text": b}\n', ":2: not valid JSON at column 10"),
    ("a.jsonl", '{"text": "a"}\n["text"]\n', ":2: a row must be a JSON object {...}, found an array"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ":2: not UTF-8 (byte 0xff at offset 24)"),
    ("a.jsonl", '{"text": "a"}'.encode("utf-16"), ":1: not UTF-8 (byte 0xff at offset 0). It looks like UTF-16"),
    ("a.json", '[\n {"text": "a"},\n {"text": }\n]', ":3: not valid JSON at column 11"),
    ("a.json", '[{"text": "a"}, 5]', ":2: a row must be a JSON object {...}, found a number"),
    ("a.json", '"text"', ": expected an array of objects, or an object that holds one, found a string"),
    ("a.json", '{"a": [], "b": []}', ": a JSON object must hold its rows as its one list; this has 2"),
    ("a.csv", "text,other\na,b\nc\n", ":3: 1 cells, but the header names 2 columns"),
    ("a.csv", "text,text\na,b\n", ":1: the header must name each column, once each"),
    ("a.csv", 'text\n"never closed\n', ":2: not valid CSV"),
    ("a.csv", 'messages\n"[{]"\n', ":2, column 'messages': not valid JSON at column 3"),
    ("a.parquet", b"PAR1 but no more", ": not a readable parquet file"),
    ("a.jsonl.gz", b"not gzip", ": not a readable jsonl file"),
    ("a.jsonl.gz", gzip.compress(LINES.encode())[:-12], ": not a readable jsonl file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[message for _, _, message in BAD_FILES])
def test_bad_files(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        rows(path)
    assert str(caught.value).startswith(f"{path}{message}")
