"""Rows of arbitrary JSON and files of arbitrary bytes: data, or a clear error with file and line; never a traceback."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyralis.data.dataset import BuiltData, DataSettings, build_dataset
from pyralis.data.formats import FORMATS
from pyralis.data.template import resolve_template
from pyralis.errors import PyralisError
from tests.data.test_dataset import TEMPLATE, TOKENIZER, make_tokenizer

WITH_BOS = make_tokenizer(bos=True)
MISTRAL = resolve_template("mistral", WITH_BOS)

GOOD = {
    "conversation": {"conversation": [{"human": "q", "assistant": "a"}]},
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "output": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "words"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
}
assert sorted(GOOD) == sorted(FORMATS)

odd_texts = st.sampled_from(
    [
        "\ud800",
        "\ud83d\ude00",
        "\x00",
        "\x1b[2J",
        "<|im_end|>",
        "</s>",
        "<s>",
        "\u2028",
        " ",
        "",
        "\n",
        "e\u0301",
        "𠀀" * 40,
    ]
)
texts = st.text(st.characters(), max_size=12) | odd_texts
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
KEYS = sorted({key for row in GOOD.values() for key in row} | {"role", "content", "from", "value", "human", "assistant",
              "system", "history", "input", "tool_calls", "type"})  # fmt: skip
keys = st.sampled_from(KEYS) | texts
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]) | texts, "content": texts})
    | st.fixed_dictionaries({"human": texts, "assistant": texts})
    | st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": texts})
    | json_values,
    max_size=5,
)


@st.composite
def rows_of(draw: st.DrawFn, fmt: str) -> Any:
    """A row that begins as one of the format, with some of its values anything at all; or anything at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(json_values)
    row: dict[str, Any] = {key: draw(turns | texts | json_values | st.just(GOOD[fmt][key])) for key in GOOD[fmt]}
    return row | draw(st.dictionaries(keys, json_values, max_size=2))


def build(file: Path, *, bos: bool = False, **options: Any) -> BuiltData:
    tokenizer, template = (WITH_BOS, MISTRAL) if bos else (TOKENIZER, TEMPLATE)
    chosen = {"max_seq_length": 40, "max_prompt_length": 8, "max_data_lost": 1.0, "cache_dir": str(file.parent)}
    return build_dataset(DataSettings((str(file),), **(chosen | options)), tokenizer, template)


def refusal(file: Path, **options: Any) -> str | None:
    """What the data is refused with; None where it is taken. Any other error is a bug, and raised."""
    try:
        build(file, **options)
    except PyralisError as error:
        return str(error)
    return None


def check_rows(fmt: str, rows: list[Any], bos: bool, on_overlong: Any) -> None:
    options: dict[str, Any] = {"bos": bos, "on_overlong": on_overlong, "data_format": fmt}
    options["task_type"] = "dpo" if fmt == "preference" else "sft"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in (GOOD[fmt], *rows)), encoding="utf-8")
        message = refusal(file, **options)
        if message is not None:
            assert message.startswith(f"{file}:"), message
            assert 2 <= int(message[len(f"{file}:") :].split(":")[0]) <= len(rows) + 1, message
            message.encode()
            assert all(character.isprintable() or character == "\n" for character in message), repr(message)
            assert len(message) < 2000
        if on_overlong != "error":
            skipped = build(file, on_bad_row="skip", **options)
            assert skipped.report.rows_read == len(rows) + 1
            assert skipped.report.rows_kept >= 1
            skipped_lines = skipped.left_out.read_text("utf-8").splitlines() if skipped.left_out else []
            assert len(skipped_lines) == skipped.report.rows_dropped


@pytest.mark.parametrize("fmt", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_arbitrary_rows(fmt: str, data: st.DataObject) -> None:
    rows = data.draw(st.lists(rows_of(fmt), min_size=1, max_size=4))
    check_rows(fmt, rows, data.draw(st.booleans()), data.draw(st.sampled_from(["truncate", "drop", "split", "error"])))


@pytest.mark.full
@pytest.mark.parametrize("fmt", FORMATS)
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_very_many_arbitrary_rows(fmt: str, data: st.DataObject) -> None:
    rows = data.draw(st.lists(rows_of(fmt), min_size=1, max_size=4))
    check_rows(fmt, rows, data.draw(st.booleans()), data.draw(st.sampled_from(["truncate", "drop", "split", "error"])))


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"text": ' * 5000,
        '{"text": ' + "9" * 5000 + "}",
        '{"text": NaN}',
        "\x00",
        '{"text": "a"} x',
        "{}{}",
    ],
    ids=["deep list", "deep object", "long number", "NaN", "NUL", "more behind", "two"],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_that_strains_the_parser(line: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(line)
    message = refusal(file)
    assert message is not None
    assert message.startswith(str(file))
    assert len(message) < 2000


# ---- files of anything ----


def _parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two"], "more": [1, 2]}), buffer)
    return buffer.getvalue()


def _arrow() -> bytes:
    table = pa.table({"text": ["one", "two"]})
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


LINES = b'{"text": "one"}\n{"text": "two"}\n'
FILES = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "a.jsonl.zst": pa.compress(LINES, codec="zstd", asbytes=True),
    "a.json": b'[{"text": "one"}, {"text": "two"}]',
    "a.csv": b'text,more\n"one, two",3\nfour,5\n',
    "a.tsv": b"text\tmore\none\t2\n",
    "a.txt": b"words and words",
    "a.parquet": _parquet(),
    "a.arrow": _arrow(),
}


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes changed, put in or cut off; or anything at all."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=60))
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(found)))
        found[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(found[: draw(st.integers(0, len(found)))]) if draw(st.booleans()) else bytes(found)


def check_file(name: str, content: bytes, on_bad_row: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        message = refusal(file, on_bad_row=on_bad_row)
        if message is not None:
            assert message.startswith(str(file)), message
            message.encode()
            assert len(message) < 2000


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files(name: str, data: st.DataObject) -> None:
    check_file(name, data.draw(damaged(FILES[name])), data.draw(st.sampled_from(["error", "skip"])))


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
def test_names_of_columns_that_are_no_text(name: str) -> None:
    for changed in (b"\x80ext", b"\xff\xff\xff\xff"):
        check_file(name, FILES[name].replace(b"text", changed), "error")


@pytest.mark.full
@pytest.mark.parametrize("name", FILES)
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_very_many_damaged_files(name: str, data: st.DataObject) -> None:
    check_file(name, data.draw(damaged(FILES[name])), data.draw(st.sampled_from(["error", "skip"])))
