"""`on_bad_row`, `on_overlong` and `max_data_lost`: what is skipped, cut, split, listed and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyralis.data import encoded_row, processes
from pyralis.data.dataset import BuiltData
from pyralis.errors import DataError, TemplateError
from tests.data.test_dataset import IGNORED, TOKENIZER, learnt, pairs, text
from tests.data.test_dataset import build as build  # a fixture

GOOD = pairs(("short", "answer"))
SHORT = {"messages": [{"role": "user", "content": "short"}, {"role": "assistant", "content": "answer"}]}
TOOL = {"conversation": [{"human": "q", "assistant": 5}]}


def write_lines(path: Path, *lines: str | bytes) -> None:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))


def listed(built: BuiltData) -> list[dict[str, Any]]:
    assert built.left_out is not None
    return [json.loads(line) for line in built.left_out.read_text(encoding="utf-8").splitlines()]


# ---- bad rows ----

ROWS = [
    json.dumps(GOOD),
    '{"conversation": ',
    b'{"conversation": "\xff"}',
    "[1, 2]",
    json.dumps({"other": 1}),
    json.dumps(TOOL),
    json.dumps({"conversation": [{"human": "q", "assistant": "a"}, {"human": "\ud83d", "assistant": "half"}]}),
    json.dumps(pairs(("last", "one"))),
]
DETAILS = [
    (2, "not valid JSON at column 18"),
    (3, "not UTF-8 (byte 0xff at offset"),
    (4, "a row must be a JSON object {...}, found an array"),
    (5, "this row has no 'conversation'"),
    (6, "conversation[0].assistant must be text, found a number"),
    (7, r"conversation[1].human holds half a character, \ud83d at position 0"),
]


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_rows_are_skipped_counted_and_listed_in_order(
    workers: int, build: Callable[..., BuiltData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PARALLEL_FROM_ROWS", 3)
    monkeypatch.setattr(processes, "CHUNK_ROWS", 2)
    monkeypatch.setattr(processes, "usable_cpus", lambda: 3)
    write_lines(tmp_path / "rows.jsonl", *ROWS)
    built = build({}, files=["rows.jsonl"], on_bad_row="skip", num_workers=workers)
    assert [learnt(row) for row in built.train] == ["answer<|im_end|>", "one<|im_end|>"]
    assert (built.report.rows_read, built.report.rows_kept, built.report.rows_dropped) == (8, 2, 6)
    rows = listed(built)
    assert [(row["file"], row["row"], row["reason"]) for row in rows] == [
        (str(tmp_path / "rows.jsonl"), number, encoded_row.BAD) for number, _ in DETAILS
    ]
    for row, (_, detail) in zip(rows, DETAILS, strict=True):
        assert row["detail"].startswith(detail)
    summary = "\n".join(built.report.summary_lines())
    assert "dropped 6 rows, bad row" in summary
    assert "rows.jsonl:2 (not valid JSON at column 18" in summary
    again = build({}, files=["rows.jsonl"], on_bad_row="skip")
    assert again.from_cache
    assert listed(again) == rows


@pytest.mark.parametrize("line", range(1, len(ROWS) - 1))
def test_without_skipping_the_first_bad_row_stops(line: int, build: Callable[..., BuiltData], tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", ROWS[0], ROWS[line])
    with pytest.raises(DataError) as caught:
        build({}, files=["rows.jsonl"])
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl:2: {DETAILS[line - 1][1]}")


def test_a_first_row_of_no_format_does_not_decide_for_its_file(build: Callable[..., BuiltData]) -> None:
    built = build([{"other": 1}, GOOD, {"text": "of another format"}], on_bad_row="skip")
    assert [row["row"] for row in listed(built)] == [1, 3]
    assert built.report.files[0].format == "conversation"


def test_rows_of_csv_and_json_are_skipped_too(build: Callable[..., BuiltData], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\none,two\nthree\nfour,five\n")
    (tmp_path / "b.json").write_text(json.dumps([7, {"prompt": "six", "completion": "seven"}]))
    built = build({}, files=["a.csv", "b.json"], on_bad_row="skip")
    assert [learnt(row) for row in built.train] == ["two</s>", "five</s>", "seven</s>"]
    assert [(Path(row["file"]).name, row["row"]) for row in listed(built)] == [("a.csv", 3), ("b.json", 1)]


def test_what_the_template_refuses_is_a_bad_row(build: Callable[..., BuiltData]) -> None:
    tool = {"messages": [{"role": "tool", "content": "17"}, {"role": "assistant", "content": "It is 17."}]}
    ok = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    with pytest.raises(TemplateError, match=r"train.jsonl:2: template 'yi' cannot write message 0 of role 'tool'"):
        build([ok, tool, ok])
    built = build([ok, tool, ok], on_bad_row="skip")
    assert len(built.train) == 2
    assert listed(built)[0]["detail"].startswith("template 'yi' cannot write message 0 of role 'tool'")


def test_a_file_that_is_no_file_is_refused_all_the_same(build: Callable[..., BuiltData], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": ')
    with pytest.raises(DataError, match=r"a.json:1: not valid JSON"):
        build({}, files=["a.json"], on_bad_row="skip")


def test_nothing_but_bad_rows_is_refused_with_the_first_reason(build: Callable[..., BuiltData]) -> None:
    with pytest.raises(
        DataError, match=r"any of the 3 rows: bad row: 3 \(.*:1 \(preference rows .* not sft\.\).*data_for"
    ):
        build([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3, on_bad_row="skip")


# ---- long rows ----

LIMIT = 60


def long_conversation(rounds: int) -> dict[str, Any]:
    turns = [{"role": "system", "content": "S"}]
    for number in range(rounds):
        turns += [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number};"}]
    return {"messages": turns}


def test_a_long_conversation_is_split_between_rounds(build: Callable[..., BuiltData]) -> None:
    built = build([long_conversation(9), SHORT], max_seq_length=LIMIT, on_overlong="split")
    texts = [text(row) for row in built.train][:-1]
    assert len(texts) > 1
    for piece in texts:
        assert piece.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq")
    assert "".join(learnt(row) for row in built.train) == "".join(f"a{i};<|im_end|>" for i in range(9)) + (
        "answer<|im_end|>"
    )
    # the most rounds that fit: one more would not
    whole = long_conversation(9)["messages"]
    for row, following in zip(built.train, texts[1:]):
        assert row["length"] <= LIMIT
        rounds = learnt(row).count(";")
        more = {"messages": whole[: 1 + 2 * (rounds + 1)]}
        assert build([more], max_seq_length=500).report.longest > LIMIT
        assert following
    report = built.report
    assert (report.rows_read, report.split, report.pieces, report.truncated, report.tokens_lost) == (
        2, 1, len(texts), 0, 0,
    )  # fmt: skip
    assert f"{len(texts) + 1} rows kept of 2 (1 long one split into {len(texts)})" in "\n".join(report.summary_lines())


def test_a_round_too_long_alone_is_cut_and_counted(build: Callable[..., BuiltData]) -> None:
    row = long_conversation(2)
    row["messages"][2]["content"] = "x" * 100
    built = build([row], max_seq_length=LIMIT, on_overlong="split")
    assert [len(one["input_ids"]) for one in built.train] == [LIMIT, built.train[1]["length"]]
    assert learnt(built.train[1]) == "a1;<|im_end|>"
    assert (built.report.split, built.report.truncated) == (1, 1)
    uncut = build([{"messages": row["messages"][:3]}], max_seq_length=500).report.tokens
    assert built.report.tokens_lost == uncut - LIMIT


def test_splitting_for_the_last_turn_keeps_the_last_rounds(build: Callable[..., BuiltData]) -> None:
    built = build([long_conversation(9)], max_seq_length=LIMIT, on_overlong="split", loss_on="last_turn")
    (row,) = built.train
    assert learnt(row) == "a8;<|im_end|>"
    assert text(row).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq")
    whole = build([long_conversation(9)], max_seq_length=500).report.tokens
    assert built.report.tokens_lost == whole - row["length"]


@pytest.mark.parametrize("length", [199, 200, 201, 399, 400, 401, 1000])
def test_text_is_split_so_that_every_token_is_learnt_once(length: int, build: Callable[..., BuiltData]) -> None:
    words = "".join(chr(97 + i % 26) for i in range(length - 1))  # and the EOS
    built = build([{"text": words}], on_overlong="split")
    assert "".join(learnt(row) for row in built.train) == words[1:] + "</s>"
    assert max(row["length"] for row in built.train) <= 200
    assert built.report.tokens_lost == 0
    for before, after in zip(built.train, list(built.train)[1:]):
        assert after["input_ids"][0] == before["input_ids"][-1]


def test_a_completion_is_split_too(build: Callable[..., BuiltData]) -> None:
    built = build([{"prompt": "Say: ", "completion": "abc" * 100}], on_overlong="split")
    assert "".join(learnt(row) for row in built.train) == "abc" * 100 + "</s>"
    assert text(built.train[0]).startswith("Say: abc")


def test_tokens_lost_are_counted(build: Callable[..., BuiltData]) -> None:
    long = pairs(("q", "a" * 300))
    whole = build([GOOD, long], max_seq_length=1000).report
    cut = build([GOOD, long]).report
    assert cut.tokens + cut.tokens_lost == whole.tokens
    assert cut.uncut_percentiles == whole.length_percentiles
    assert not whole.uncut_percentiles
    assert f"99 % up to {dict(whole.length_percentiles)[99]}" in "\n".join(cut.summary_lines())
    assert any("1 rows are cut inside their last answer" in warning for warning in cut.warnings)
    dropped = build([GOOD, long], on_overlong="drop")
    assert dropped.report.tokens + dropped.report.tokens_lost == whole.tokens
    assert dropped.report.uncut_percentiles == whole.length_percentiles
    assert listed(dropped)[0] | {"file": ""} == {
        "file": "", "row": 2, "reason": encoded_row.OVERLONG, "tokens": dropped.report.tokens_lost,
    }  # fmt: skip
    assert f"lost by that: {dropped.report.tokens_lost} tokens" in "\n".join(dropped.report.summary_lines())
    # cut at the very end, behind the last stop: the answer is learnt whole
    stops = whole.longest - 1
    assert not build([GOOD, long], max_seq_length=stops).report.warnings


# ---- the limit ----


def test_more_lost_than_allowed_is_refused(build: Callable[..., BuiltData], tmp_path: Path) -> None:
    rows: list[Any] = [GOOD] * 7 + [TOOL] * 3
    assert build(rows, on_bad_row="skip", max_data_lost=0.3).report.rows_dropped == 3
    with pytest.raises(DataError, match=r"train.jsonl: 30.0% of the rows are left out, more than max_data_lost 0.29 a"):
        build(rows, on_bad_row="skip", max_data_lost=0.29)
    long = pairs(("q", "a" * 2000))
    with pytest.raises(
        DataError, match=r"8\d.\d% of the tokens are lost, .* cut to max_seq_length 200: 1 rows. Raise max"
    ):
        build([GOOD, GOOD, long], max_data_lost=0.5)
    many = pairs(*[("q", "a" * 100)] * 9)
    with pytest.raises(DataError, match="% of the tokens are lost"):
        build([GOOD, many], max_data_lost=0.5)
    assert build([GOOD, many], max_data_lost=0.5, on_overlong="split").report.tokens_lost == 0
    with pytest.raises(DataError, match=r"eval.jsonl: 50.0% of the rows"):
        build({"train.jsonl": [GOOD], "eval.jsonl": [GOOD, TOOL]}, eval_files=["eval.jsonl"], on_bad_row="skip",
              max_data_lost=0.4)  # fmt: skip


# ---- rows that come again ----


def test_duplicates_and_rows_that_are_evaluated_on(build: Callable[..., BuiltData], tmp_path: Path) -> None:
    rows = [pairs((f"q{i}", f"a{i}")) for i in range(5)]
    files = {"train.jsonl": [*rows, rows[1], rows[3], rows[1]], "eval.jsonl": [rows[4], pairs(("new", "one")), rows[1]]}
    report = build(files, eval_files=["eval.jsonl"]).report
    assert report.eval is not None
    assert (report.duplicates, report.shared, report.eval.duplicates, report.eval.shared) == (3, 0, 0, 2)
    warnings = " | ".join(report.warnings)
    train, evaluation = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    assert f"3 rows are the same as an earlier one ({train}:6 is {train}:2, {train}:7 is {train}:4" in warnings
    assert f"2 of 3 evaluation rows are training rows too ({evaluation}:1 is {train}:5, {evaluation}:3 is " in warnings
    assert not build(rows).report.warnings
    # held out of the training data, where the same rows stand on both sides
    held = build([rows[0]] * 10, eval_split=0.3).report
    assert held.eval is not None
    assert (held.eval.shared, held.duplicates) == (3, 6)


def test_the_same_tokens_of_another_label_are_no_duplicates_of_pairs(build: Callable[..., BuiltData]) -> None:
    one = {"prompt": "p", "chosen": "ab", "rejected": "c"}
    other = {"prompt": "p", "chosen": "a", "rejected": "bc"}
    assert build([one, other, one], task_type="dpo").report.duplicates == 1


def test_packed_rows_are_compared_before_packing(build: Callable[..., BuiltData]) -> None:
    assert build([GOOD] * 4, packing=True).report.duplicates == 3
    documents = [{"text": "one"}, {"text": "two"}, {"text": "one"}]
    assert build(documents, task_type="pretrain", template=None).report.duplicates == 1


# ---- templates ----


def test_a_template_unlike_the_tokenizers_own_is_said(build: Callable[..., BuiltData]) -> None:
    from pyralis.data.template import resolve_template
    from tests.data.test_dataset import make_tokenizer

    tokenizer = make_tokenizer()
    chatml = resolve_template("yi", tokenizer)
    tokenizer.chat_template = chatml.jinja
    assert not build([GOOD], tokenizer=tokenizer, template=chatml).report.warnings
    other = resolve_template("vicuna", tokenizer)
    (warning,) = (w for w in build([GOOD], tokenizer=tokenizer, template=other).report.warnings if "own" in w)
    assert warning.startswith("template_name vicuna writes ")
    assert 'set template_name to ""' in warning
    # only the default system text differs: the first difference stands there
    qwen = resolve_template("qwen", tokenizer)
    (warning,) = build([GOOD], tokenizer=tokenizer, template=qwen).report.warnings
    assert "system" in warning.split("where the tokenizer's own")[0]
    # what the config's `system` says is the user's own word
    with_system = resolve_template("yi", tokenizer, system="Be brief.")
    assert not build([GOOD], tokenizer=tokenizer, template=with_system).report.warnings


def test_labels_are_within_the_row(build: Callable[..., BuiltData]) -> None:
    built = build([long_conversation(9), {"messages": long_conversation(1)["messages"]}], max_seq_length=LIMIT,
                  on_overlong="split")  # fmt: skip
    for row in built.train:
        learnt_places = np.flatnonzero(row["labels"] != IGNORED)
        assert (row["labels"][learnt_places] == row["input_ids"][learnt_places]).all()
        assert TOKENIZER.decode([int(row["labels"][learnt_places[-1]])]) == "<|im_end|>"
