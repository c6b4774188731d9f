"""Weighted entries of train_file, built: shares, passes, the cache, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyralis.data.dataset import BuiltData
from pyralis.errors import DataError
from tests.data.test_dataset import TOKENIZER, build, pairs  # noqa: F401  (a fixture)

Build = Callable[..., BuiltData]


def letters(letter: str, count: int, length: int) -> list[dict[str, str]]:
    return [{"text": letter * length} for _ in range(count)]


def counts(built: BuiltData) -> dict[str, int]:
    ids = [token for row in built.train for token in row["input_ids"].tolist()]
    return {letter: ids.count(ord(letter) - ord("!")) for letter in "ab"}  # the byte-level alphabet begins with "!"


def test_shares_of_packed_documents(build: Build) -> None:  # noqa: F811
    rows = {"a.jsonl": letters("a", 60, 19), "b.jsonl": letters("b", 10, 19)}
    options: dict[str, Any] = {"files": ["a.jsonl", "b.jsonl"], "task_type": "pretrain", "max_seq_length": 50}
    plain = build(rows, **options)
    assert counts(plain) == {"a": 1140, "b": 190}
    mixed = build(rows, **options, weights=(1.0, 1.0))
    assert counts(mixed) == {"a": 1140, "b": pytest.approx(1140, abs=19)}
    assert any("49.6% of the tokens (weight 1), gone through 5.9 times" in line for line in mixed.report.warnings)
    first = build(rows, **options, weights=(1.0, 1.0), stop="first_exhausted")
    assert counts(first) == {"a": pytest.approx(190, abs=19), "b": 190}
    assert not any("the same as an earlier one (0" in line for line in mixed.report.warnings)
    again = build(rows, **options, weights=(1.0, 1.0))
    assert again.from_cache
    assert not build(rows, **options, weights=(2.0, 1.0)).from_cache


def test_conversations_of_a_folder_and_a_file(build: Build) -> None:  # noqa: F811
    rows = {
        "folder/one.jsonl": [pairs((f"q{i}", "a" * 20)) for i in range(3)],
        "folder/two.jsonl": [pairs((f"r{i}", "a" * 20)) for i in range(3)],
        "b.jsonl": [pairs((f"s{i}", "b" * 20)) for i in range(3)],
    }
    built = build(rows, files=["folder", "b.jsonl"], weights=(1.0, 1.0))
    answers = [TOKENIZER.decode(row["input_ids"]) for row in built.train]
    assert [sum(letter * 20 in answer for answer in answers) for letter in "ab"] == [6, 5]
    assert build(rows, files=["folder", "b.jsonl"], weights=(1.0, 1.0), eval_split=0.25).report.eval is not None


def test_refusals(build: Build) -> None:  # noqa: F811
    rows = {"a.jsonl": letters("a", 6, 9), "b.jsonl": letters("", 2, 0)}
    with pytest.raises(DataError, match=r"b\.jsonl: none of its rows is left to be mixed"):
        build(rows, files=["a.jsonl", "b.jsonl"], task_type="pretrain", weights=(1.0, 1.0))
    with pytest.raises(DataError, match="in two entries of train_file"):
        build(rows, files=["a.jsonl", "a.jsonl"], task_type="pretrain", weights=(1.0, 1.0))
