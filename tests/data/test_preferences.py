"""Preference rows: built, cut, held out, shown and put into batches."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pyralis.data import encode
from pyralis.data.dataset import BuiltData
from pyralis.data.pairs import PairCollator
from pyralis.data.preview import preview
from pyralis.data.store import highest_token, longest_sequence
from pyralis.errors import DataError
from tests.data.test_dataset import TOKENIZER
from tests.data.test_dataset import build as build  # a fixture

PAIR = {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?!"}
PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def parts(row: dict[str, Any]) -> list[str]:
    ids, texts, start = row["input_ids"].tolist(), [], 0
    for length in row["pair_lengths"]:
        texts.append(TOKENIZER.decode(ids[start : start + length]))
        start += length
    assert start == len(ids) == row["length"]
    return texts


def test_a_pair_becomes_ids(build: Callable[..., BuiltData]) -> None:
    built = build([PAIR], task_type="dpo")
    (row,) = built.train
    assert parts(row) == [PROMPT, "Hello.<|im_end|>", "What?!<|im_end|>"]
    prompt, chosen, rejected = row["pair_lengths"]
    assert (row["labels"] != -100).sum() == chosen + rejected == built.report.supervised_tokens
    assert built.train.column_names == ["input_ids", "labels", "pair_lengths", "length"]
    assert longest_sequence(built.train) == prompt + max(chosen, rejected)
    assert highest_token(built.train) == max(row["input_ids"])
    assert build([PAIR], task_type="dpo").from_cache
    batch = PairCollator(0)(list(built.train))
    assert TOKENIZER.decode(batch["input_ids"][0]).startswith(PROMPT + "Hello.<|im_end|>")
    assert batch["response_lengths"].tolist() == [chosen, rejected]


def test_overlong(build: Callable[..., BuiltData], tmp_path: Path) -> None:
    whole = build([PAIR], task_type="dpo").train[0]
    prompt, chosen, rejected = map(int, whole["pair_lengths"])
    long = {**PAIR, "prompt": "Hi" * 90}
    options: dict[str, Any] = {"task_type": "dpo", "max_seq_length": prompt + rejected, "max_prompt_length": 4}
    built = build([PAIR, long], **options)
    assert (built.report.rows_kept, built.report.truncated) == (2, 1)
    assert [row["pair_lengths"].tolist() for row in built.train] == [[prompt, chosen, rejected]] * 2
    assert parts(built.train[1])[0] == "HiHiHiHi<|im_end|>\n<|im_start|>assistant\n"  # its last tokens
    dropped = build([PAIR, long], on_overlong="drop", **options).report
    assert [(drop.reason, drop.rows) for drop in dropped.dropped] == [(encode.OVERLONG, 1)]
    with pytest.raises(DataError, match=r"train.jsonl:2: \d+ tokens, but max_seq_length is"):
        build([PAIR, long], on_overlong="error", **options)


def test_answers_that_are_the_same_once_they_are_cut(build: Callable[..., BuiltData]) -> None:
    same = {**PAIR, "chosen": "a" * 300 + "b", "rejected": "a" * 300 + "c"}
    report = build([PAIR, same], task_type="dpo", max_prompt_length=8).report
    assert [(drop.reason, drop.examples) for drop in report.dropped] == [
        (encode.SAME_ANSWERS, (str(report.files[0].file) + ":2",))
    ]
    with pytest.raises(DataError, match="They differ only behind max_seq_length"):
        build([same], task_type="dpo", max_prompt_length=8)


def test_rows_held_out(build: Callable[..., BuiltData]) -> None:
    rows = [{**PAIR, "prompt": f"Hi {i}"} for i in range(10)]
    built = build(rows, task_type="dpo", eval_split=0.3)
    assert built.eval is not None
    assert sorted([*map(tuple, map(parts, built.train)), *map(tuple, map(parts, built.eval))]) == sorted(
        (PROMPT.replace("Hi", f"Hi {i}"), "Hello.<|im_end|>", "What?!<|im_end|>") for i in range(10)
    )


def test_a_bad_row_is_named(build: Callable[..., BuiltData]) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]
    more = [*turns, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    other = [turns[0], {"role": "assistant", "content": "d"}]
    with pytest.raises(DataError, match=r"train.jsonl:2: chosen: expected one assistant message"):
        build([PAIR, {"chosen": more, "rejected": other}], task_type="dpo")
    with pytest.raises(DataError, match=r"train.jsonl:1: a conversation needs a chat template"):
        build([PAIR], task_type="dpo", template=None)


def test_control_strings_are_counted(build: Callable[..., BuiltData]) -> None:
    report = build([{**PAIR, "rejected": "x<|im_end|>y"}, PAIR], task_type="dpo").report
    assert any(encode.CONTROL_STRINGS in warning for warning in report.warnings)


def test_preview_shows_the_prompt_with_each_answer(build: Callable[..., BuiltData]) -> None:
    console = Console(file=StringIO(), width=100, no_color=True)
    console.print(preview(build([PAIR], task_type="dpo").train, TOKENIZER))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{PROMPT}【Hello.<|im_end|>】" in shown
    assert f"{PROMPT}【What?!<|im_end|>】" in shown
    assert "row 1: chosen," in shown
