"""Streams of documents: full rows without end, weights kept, and the same rows from wherever they are taken up."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from pyralis.data import encode
from pyralis.data.collate import Collator
from pyralis.data.dataset import DataSettings
from pyralis.data.stream import DocumentStream, Position
from pyralis.data.stream_build import build_stream
from pyralis.errors import DataError, ModelError
from tests.data.test_dataset import make_tokenizer, write

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id


def texts(letter: str, count: int, longest: int) -> list[dict[str, str]]:
    """Documents of one letter, their number at the front; every seventh is empty."""
    return [
        {"text": "" if i % 7 == 6 else f"{i}{letter}" + letter * (i * 37 % longest)} for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def make(**options: Any) -> DocumentStream:
        files = (
            write(tmp_path / "a.jsonl", texts("a", 40, 90)), write(tmp_path / "b.jsonl", texts("b", 25, 11)),
        )  # fmt: skip
        settings: dict[str, Any] = {"max_seq_length": 32, "task_type": "pretrain", "streaming": True, "buffer_size": 8}
        built = build_stream(DataSettings(**{"files": files, **settings, **options}), TOKENIZER)
        assert built.is_stream
        stream: Any = built.train
        return stream  # type: ignore[no-any-return]

    return make


def take(stream: DocumentStream, count: int) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in itertools.islice(stream, count)]


def documents(rows: list[list[int]]) -> list[str]:
    """Whole documents, by the EOS between them."""
    return TOKENIZER.decode(list(itertools.chain(*rows))).split("</s>")[:-1]


def test_rows_are_full_and_hold_every_document_with_an_eos(make: Any) -> None:
    stream = make(buffer_size=1)
    rows = list(itertools.islice(stream, 120))
    assert all(len(row["input_ids"]) == 32 and row["seq_lengths"].sum() == 32 for row in rows)
    assert all(row["labels"][0] == -100 and (row["labels"][1:] == row["input_ids"][1:]).all() for row in rows)
    expected = [row["text"] for row in (*texts("a", 40, 90), *texts("b", 25, 11)) if row["text"]]
    found = documents([row["input_ids"].tolist() for row in rows])
    assert len(found) > len(expected)
    assert found == (expected * 4)[: len(found)], "in the order of the files, and again from the front"


def test_each_pass_is_shuffled_in_blocks_and_whole(make: Any) -> None:
    found = documents(take(make(), 250))
    whole = [row["text"] for row in (*texts("a", 40, 90), *texts("b", 25, 11)) if row["text"]]
    first, second = found[: len(whole)], found[len(whole) : 2 * len(whole)]
    assert sorted(first) == sorted(second) == sorted(whole)
    assert first != second
    assert first != whole
    assert set(first[:6]) <= {row["text"] for row in texts("a", 8, 90)}, "a block of 8, of which one is empty"
    assert documents(take(make(seed=1), 40)) != found[:40]


@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
@pytest.mark.parametrize("buffer_size", [1, 8])
def test_goes_on_from_anywhere(make: Any, weights: tuple[float, ...], buffer_size: int) -> None:
    options = {"weights": weights, "buffer_size": buffer_size}
    stream = make(**options)
    rows, positions = [], []
    for row in itertools.islice(stream, 150):
        rows.append(row["input_ids"].tolist())
        positions.append(stream.position_after(len(rows)))
    inside = [position for position in positions if position.source is not None]
    assert len(inside) > 50, "rows that end inside of a document"
    for at in (1, 2, 7, 33, 34, 35, 36, 99, 149):
        resumed = make(**options)
        resumed.seek(Position.from_json(json.loads(json.dumps(positions[at - 1].to_json()))))
        assert take(resumed, 150 - at) == rows[at:]
        assert resumed.position_after(150) == positions[-1]


def test_what_is_behind_is_not_tokenised_again(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make()
    take(stream, 30)
    position = stream.position_after(30)
    calls = []
    original = encode.encode_text
    monkeypatch.setattr(encode, "encode_text", lambda text, *a, **k: calls.append(text) or original(text, *a, **k))
    resumed = make()
    calls.clear()
    resumed.seek(position)
    take(resumed, 1)
    assert len(calls) < 8


def test_weights_are_shares_of_the_tokens(make: Any) -> None:
    text = "".join(documents(take(make(weights=(1.0, 3.0)), 300)))
    shares = {letter: text.count(letter) for letter in "ab"}
    # a document of b has about 6 letters beside its number and its EOS, which count as its tokens
    tokens = make(weights=(1.0, 3.0))
    take(tokens, 300)
    given = tokens.position_after(300).tokens
    assert given[1] / sum(given) == pytest.approx(0.75, abs=0.02)
    assert shares["b"] > shares["a"]


def test_in_a_loader(make: Any) -> None:
    batch = next(iter(DataLoader(make(), batch_size=4, collate_fn=Collator(0))))
    assert batch["input_ids"].shape == (4, 32)
    with pytest.raises(DataError, match="dataloader_num_workers"):
        next(iter(DataLoader(make(), batch_size=4, num_workers=1, collate_fn=Collator(0))))


def test_report_is_of_the_beginning(tmp_path: Path) -> None:
    files = (write(tmp_path / "a.jsonl", texts("a", 40, 90)),)
    settings = DataSettings(
        files, 32, eval_files=files, task_type="pretrain", streaming=True, cache_dir=str(tmp_path / "cache")
    )  # fmt: skip
    built = build_stream(settings, TOKENIZER)
    assert any("is a stream" in line for line in built.report.warnings)
    assert built.report.rows_kept == 35
    assert built.eval is not None
    assert built.report.eval is not None
    assert built.report.eval.rows_kept == 35


def test_says_what_is_wrong(make: Any, tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl", [{"text": ""}] * 3)
    settings: dict[str, Any] = {"max_seq_length": 32, "task_type": "pretrain", "streaming": True}
    with pytest.raises(DataError, match="none of the first 200 rows is a document"):
        build_stream(DataSettings((empty,), **settings), TOKENIZER)
    same = write(tmp_path / "same.jsonl", texts("a", 4, 9))
    with pytest.raises(DataError, match="is in two entries of train_file"):
        build_stream(DataSettings((same, str(tmp_path)), weights=(1.0, 1.0), **settings), TOKENIZER)
    stream = make()
    stream.vocabulary = 10
    with pytest.raises(ModelError, match="has only 10 embeddings"):
        take(stream, 1)
    with pytest.raises(DataError, match="place in 2 sources"):
        make().seek(Position.start(2))


def test_positions_given_are_kept_until_asked_for_later_ones(make: Any) -> None:
    stream = make()
    rows = iter(stream)
    for _ in range(5):
        next(rows)
    assert [stream.position_after(n).rows for n in (2, 4, 5)] == [2, 4, 5]
    assert np.array_equal(stream.position_after(5).tokens, stream.position_after(5).tokens)
