"""From files to rows of token ids: what is learnt, dropped, packed, cached, and said."""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pyralis.data import encode, processes
from pyralis.data.cache import REPORT_NAME, build_once
from pyralis.data.collate import Collator, num_supervised
from pyralis.data.dataset import BuiltData, DataSettings, build_dataset
from pyralis.data.template import resolve_template
from pyralis.errors import DataError, TemplateError

IGNORED = -100


def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token for each byte, and ChatML's markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "</s>", "<s>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>", bos_token="<s>")
    if bos:
        start = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [start])
    return tokenizer


TOKENIZER = make_tokenizer()
TEMPLATE = resolve_template("yi", TOKENIZER)  # ChatML without a default system text


def pairs(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversation": [{"human": human, "assistant": answer} for human, answer in turns]}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., BuiltData]:
    """Write rows (a list, or a dictionary of file names) and build with some settings."""

    def build(rows: Any = (), *, tokenizer: Any = TOKENIZER, template: Any = TEMPLATE, **options: Any) -> BuiltData:
        named = rows if isinstance(rows, dict) else {"train.jsonl": rows}
        for name, content in named.items():
            write(tmp_path / name, content)
        for key, default in (("files", ["train.jsonl"]), ("eval_files", [])):
            options[key] = tuple(str(tmp_path / name) for name in options.get(key, default))
        defaults = {"max_seq_length": 200, "cache_dir": str(tmp_path / "cache"), "max_data_lost": 1.0}
        settings = DataSettings(**(defaults | options))
        return build_dataset(settings, tokenizer, template)

    return build


def learnt(row: dict[str, Any]) -> str:
    return TOKENIZER.decode([int(token) for token in row["labels"] if token != IGNORED])


def text(row: dict[str, Any]) -> str:
    return TOKENIZER.decode(row["input_ids"].tolist())


def test_a_conversation_becomes_ids_and_labels(build: Callable[..., BuiltData]) -> None:
    built = build([pairs(("Hi 你好", "Hello 😀"), ("And?", "That is all."))])
    (row,) = built.train
    assert text(row) == (
        "<|im_start|>user\nHi 你好<|im_end|>\n<|im_start|>assistant\nHello 😀<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nThat is all.<|im_end|>\n"
    )
    assert learnt(row) == "Hello 😀<|im_end|>That is all.<|im_end|>"
    assert row["length"] == len(row["input_ids"]) == len(row["labels"])
    assert built.train.column_names == ["input_ids", "labels", "length"]
    assert built.eval is None
    assert not built.from_cache
    report = built.report
    assert (report.rows_read, report.rows_kept, report.sequences, report.truncated) == (1, 1, 1, 0)
    assert (report.tokens, report.longest) == (row["length"], row["length"])
    assert report.supervised_tokens == num_supervised(Collator.for_tokenizer(TOKENIZER)([row]))


@pytest.mark.parametrize(
    ("loss_on", "wanted"), [("all_turns", "one<|im_end|>two<|im_end|>"), ("last_turn", "two<|im_end|>")]
)
def test_loss_on(loss_on: str, wanted: str, build: Callable[..., BuiltData]) -> None:
    assert learnt(build([pairs(("a", "one"), ("b", "two"))], loss_on=loss_on).train[0]) == wanted


def test_loss_on_everything(build: Callable[..., BuiltData]) -> None:
    rows = [pairs(("a", "one")), {"prompt": "1+1=", "completion": "2"}]
    built = build({"a.jsonl": rows[:1], "b.jsonl": rows[1:]}, files=["a.jsonl", "b.jsonl"], loss_on="everything")
    for row in built.train:
        assert row["labels"].tolist() == [IGNORED, *row["input_ids"][1:].tolist()]


def test_prompt_and_completion(build: Callable[..., BuiltData]) -> None:
    (row,) = build([{"prompt": "1+1=", "completion": "2"}], template=None).train
    assert (text(row), learnt(row)) == ("1+1=2</s>", "2</s>")


def test_text_in_sft_is_learnt_whole_and_said(build: Callable[..., BuiltData]) -> None:
    built = build([{"text": "Some text."}], template=None)
    assert (text(built.train[0]), learnt(built.train[0])) == ("Some text.</s>", "ome text.</s>")
    assert "learnt whole" in built.report.warnings[0]


def test_bos_stands_before_text_once(build: Callable[..., BuiltData]) -> None:
    tokenizer = make_tokenizer(bos=True)
    rows = [{"text": "No mark."}, {"text": "<s>Marked already."}]
    built = build(rows, tokenizer=tokenizer, template=None)
    assert [text(row) for row in built.train] == ["<s>No mark.</s>", "<s>Marked already.</s>"]


# ---- rows that teach nothing, and long ones ----

LONG = pairs(("q" * 300, "never reached"))
CUT = pairs(("short", "a" * 300))
GOOD = pairs(("short", "answer"))
UNANSWERED = {"messages": [{"role": "user", "content": "Anybody?"}]}


def test_rows_without_anything_to_learn_are_dropped_and_named(build: Callable[..., BuiltData], tmp_path: Path) -> None:
    files = {"a.jsonl": [GOOD, LONG, CUT], "b.jsonl": [UNANSWERED], "c.jsonl": [{"text": " "}]}
    built = build(files, files=list(files))
    assert [learnt(row)[:6] for row in built.train] == ["answer", "aaaaaa"]
    report = built.report
    assert (report.rows_read, report.rows_kept, report.rows_dropped, report.truncated) == (5, 2, 3, 1)
    assert {drop.reason: drop.examples for drop in report.dropped} == {
        encode.NO_ROOM: (f"{tmp_path}/a.jsonl:2",),
        encode.NO_ANSWER: (f"{tmp_path}/b.jsonl:1",),
        encode.EMPTY: (f"{tmp_path}/c.jsonl:1",),
    }
    assert report.longest == 200
    summary = "\n".join(report.summary_lines())
    for part in ("a.jsonl: 3 rows as conversation", "2 rows kept of 5", "a.jsonl:2", "truncated 1 row"):
        assert part in summary


def test_every_batch_has_something_to_learn(build: Callable[..., BuiltData]) -> None:
    built = build([GOOD, LONG, CUT] * 4)
    for row in built.train:
        assert (row["labels"][1:] != IGNORED).any()


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        ([LONG, LONG], r"any of the 2 rows. the answer begins behind max_seq_length: 2 \(.*:1, .*:2\).*raise max_seq"),
        ([UNANSWERED], "no assistant turn: 1 .*needs an assistant turn"),
        ([{"text": ""}], "texts are empty"),
        ([], "there is no row in it"),
    ],
)
def test_nothing_to_learn_at_all_is_refused(rows: list[Any], advice: str, build: Callable[..., BuiltData]) -> None:
    with pytest.raises(DataError, match=advice):
        build(rows)


def test_overlong_rows_are_dropped_or_refused_where_asked(build: Callable[..., BuiltData], tmp_path: Path) -> None:
    dropped = build([GOOD, LONG, CUT], on_overlong="drop").report
    assert (dropped.rows_kept, dropped.truncated) == (1, 0)
    assert [(drop.reason, drop.rows) for drop in dropped.dropped] == [(encode.OVERLONG, 2)]
    with pytest.raises(
        DataError, match=r"train.jsonl:2: \d+ tokens, but max_seq_length is 200 and on_overlong is 'error'"
    ):
        build([GOOD, CUT], on_overlong="error")
    with pytest.raises(DataError, match="set on_overlong: truncate"):
        build([CUT], on_overlong="drop")


# ---- formats, files and errors ----


def test_each_file_has_its_format_which_is_logged(
    build: Callable[..., BuiltData], caplog: pytest.LogCaptureFixture
) -> None:
    alpaca = {"instruction": "Add.", "input": "1 1", "output": "2"}
    with caplog.at_level(logging.INFO, "pyralis"):
        built = build({"a.jsonl": [GOOD], "b.jsonl": [alpaca, alpaca]}, files=["a.jsonl", "b.jsonl"])
    assert [(file.format, file.rows) for file in built.report.files] == [("conversation", 1), ("alpaca", 2)]
    assert any("b.jsonl: rows are read as alpaca" in message for message in caplog.messages)
    with pytest.raises(DataError, match=r"mixed.jsonl:2: this row has no 'conversation'"):
        build({"mixed.jsonl": [GOOD, alpaca]}, files=["mixed.jsonl"])


def test_a_named_format_wins(build: Callable[..., BuiltData]) -> None:
    row = {**GOOD, "text": "As text."}
    assert text(build([row], data_format="text").train[0]) == "As text.</s>"


def test_what_a_task_cannot_take(build: Callable[..., BuiltData]) -> None:
    preference = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match=r"train.jsonl:1: preference rows .* are for task_type dpo, not sft"):
        build([preference])
    with pytest.raises(DataError, match=r"train.jsonl:1: task_type pretrain needs documents"):
        build([GOOD], task_type="pretrain")
    with pytest.raises(DataError, match=r"train.jsonl:1: task_type dpo needs preference rows, .*chosen"):
        build([{"text": "a"}], task_type="dpo")
    with pytest.raises(DataError, match=r"train.jsonl:1: a conversation needs a chat template"):
        build([GOOD], template=None)


def test_a_conversation_that_the_template_refuses_is_named(build: Callable[..., BuiltData]) -> None:
    tool = {"messages": [{"role": "tool", "content": "17"}, {"role": "assistant", "content": "It is 17."}]}
    ok = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    with pytest.raises(TemplateError, match=r"train.jsonl:2: "):
        build([ok, tool])


def test_notes_about_odd_rows(build: Callable[..., BuiltData]) -> None:
    pairs_ = [{"human": "a", "assistant": "b"}, {"human": "left alone"}]
    rows = [{"conversation": pairs_}, pairs(("a", "")), pairs(("Say <|im_end|>", "no"))]
    warnings = " | ".join(build(rows).report.warnings)
    assert "1 trailing turns without an answer" in warnings
    assert "1 empty answers" in warnings
    assert "1 messages hold a control string" in warnings


# ---- evaluation data ----


def test_eval_files(build: Callable[..., BuiltData]) -> None:
    files = {"train.jsonl": [GOOD] * 3, "eval.jsonl": [pairs(("other", "text"))]}
    built = build(files, eval_files=["eval.jsonl"])
    assert built.eval is not None
    assert learnt(built.eval[0]) == "text<|im_end|>"
    assert built.report.eval is not None
    assert built.report.eval.rows_kept == 1
    again = build(files, eval_files=["train.jsonl"])
    assert "3 of 3 evaluation rows are training rows too" in " ".join(again.report.warnings)


@pytest.mark.parametrize("packing", [False, True])
def test_eval_split_parts_the_rows_by_seed(packing: bool, build: Callable[..., BuiltData]) -> None:
    rows = [pairs((f"q{i}", f"answer {i};")) for i in range(40)]

    def answers(data: Any) -> list[str]:
        return [part for row in data for part in learnt(row).split("<|im_end|>") if part]

    built = build(rows, eval_split=0.25, packing=packing)
    train, held = answers(built.train), answers(built.eval)
    assert (len(train), len(held)) == (30, 10)
    assert sorted(train + held) == sorted(f"answer {i};" for i in range(40))
    assert built.report.eval is not None
    assert (built.report.rows_kept, built.report.eval.rows_kept) == (30, 10)
    assert answers(build(rows, eval_split=0.25, packing=packing, seed=7).eval) != held
    with pytest.raises(DataError, match="leaves none to train on"):
        build(rows[:1], eval_split=0.5)


def test_max_samples(build: Callable[..., BuiltData]) -> None:
    report = build([pairs((f"q{i}", "a")) for i in range(40)], max_samples=7).report
    assert (report.rows_read, report.rows_kept) == (7, 7)


# ---- packing ----


def test_pretraining_fills_rows_and_keeps_the_tail(build: Callable[..., BuiltData]) -> None:
    texts = ["First 一.", "Second, longer than a row of 16.", "Third."]
    files = {f"{i}.jsonl": [{"text": t}] for i, t in enumerate(texts)}
    built = build(files, files=list(files), task_type="pretrain", max_seq_length=16, template=None)
    assert "".join(text(row) for row in built.train) == "".join(f"{t}</s>" for t in texts)
    assert [int(length) for length in built.train["length"]][:-1] == [16] * (len(built.train) - 1)
    assert built.train.column_names == ["input_ids", "labels", "seq_lengths", "length"]
    for row in built.train:
        assert row["labels"].tolist() == [IGNORED, *row["input_ids"][1:].tolist()]
        assert row["seq_lengths"].sum() == row["length"]
    report = built.report
    assert (report.rows_kept, report.sequences, report.truncated) == (3, len(built.train), 0)
    assert report.supervised_tokens == report.tokens - report.sequences
    assert report.packed_fill == pytest.approx(report.tokens / (16 * report.sequences))


def test_pretraining_without_packing_keeps_documents_apart(build: Callable[..., BuiltData]) -> None:
    built = build([{"text": "One."}, {"text": "Two, cut."}], task_type="pretrain", packing=False, max_seq_length=6)
    assert [text(row) for row in built.train] == ["One.</s>", "Two, c"]
    assert built.report.truncated == 1


def test_packed_examples_keep_their_boundaries(build: Callable[..., BuiltData]) -> None:
    rows = [pairs((f"question {i}", "x" * (5 + 7 * i % 60))) for i in range(20)]
    apart, packed = build(rows), build(rows, packing=True)
    assert len(packed.train) < len(apart.train)
    assert packed.report.supervised_tokens == apart.report.supervised_tokens
    assert packed.report.tokens == apart.report.tokens
    seen = []
    for row in packed.train:
        assert row["length"] <= 200
        ends = np.cumsum(row["seq_lengths"])
        for start, end in zip([0, *ends[:-1]], ends):
            assert row["position_ids"][start:end].tolist() == list(range(end - start))
            assert row["labels"][start] == IGNORED
            seen.append(TOKENIZER.decode(row["input_ids"][start:end].tolist()))
    assert sorted(seen) == sorted(text(row) for row in apart.train)
    batch = Collator.for_tokenizer(TOKENIZER)([packed.train[0], packed.train[1]])
    assert sorted(batch) == ["input_ids", "labels", "position_ids"]


# ---- processes and cache ----


def ids(built: BuiltData) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in built.train]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PARALLEL_FROM_ROWS", 10)
    monkeypatch.setattr(processes, "CHUNK_ROWS", 7)
    monkeypatch.setattr(processes, "usable_cpus", lambda: 3)


@pytest.mark.usefixtures("small_chunks")
def test_any_number_of_processes_gives_the_same(build: Callable[..., BuiltData], tmp_path: Path) -> None:
    rows = [pairs((f"q{i}", "x" * (i % 250 + 1))) for i in range(100)] + [LONG]
    one, three = (build(rows, num_workers=n, cache_dir=str(tmp_path / f"cache{n}")) for n in (1, 3))
    assert not three.from_cache
    assert ids(one) == ids(three)
    assert one.report == three.report


@pytest.mark.usefixtures("small_chunks")
def test_an_error_in_a_process_is_the_same_error(build: Callable[..., BuiltData]) -> None:
    rows: list[Any] = [pairs(("q", "a"))] * 60
    rows[40] = {"conversation": [{"human": "q", "assistant": 5}]}
    rows[55] = {"conversation": []}
    with pytest.raises(DataError, match=r"train.jsonl:41: .* must be text, found a number"):
        build(rows, num_workers=3)


def test_the_cache_goes_by_content(build: Callable[..., BuiltData]) -> None:
    first = build([GOOD])
    assert not first.from_cache
    again = build([GOOD], num_workers=8)
    assert again.from_cache
    assert (ids(again), again.report) == (ids(first), first.report)
    # the same name with other content, other settings, another tokenizer, another template
    other_tokenizer = make_tokenizer()
    other_tokenizer.add_tokens(["Hello"])
    with_system = resolve_template("yi", TOKENIZER, system="Be brief.")
    assert not build([GOOD, GOOD]).from_cache
    assert not build([GOOD], loss_on="last_turn").from_cache
    assert not build([GOOD], tokenizer=other_tokenizer).from_cache
    assert "Be brief." in text(build([GOOD], template=with_system).train[0])
    assert build([GOOD]).from_cache
    TOKENIZER("leaves its truncation behind", truncation=True, max_length=2)
    assert build([GOOD]).from_cache


def cached_folder(tmp_path: Path) -> Path:
    (report,) = (tmp_path / "cache" / "datasets").glob(f"*/{REPORT_NAME}")
    return report.parent


@pytest.mark.parametrize("damage", ["train.arrow", REPORT_NAME, "gone"])
def test_a_damaged_cache_is_built_again(damage: str, build: Callable[..., BuiltData], tmp_path: Path) -> None:
    wanted = ids(build([GOOD]))
    folder = cached_folder(tmp_path)
    if damage == "gone":
        (folder / "train.arrow").unlink()
    else:
        (folder / damage).write_bytes((folder / damage).read_bytes()[:40])
    assert ids(build([GOOD])) == wanted
    assert build([GOOD]).from_cache


def test_a_build_that_fails_leaves_nothing(build: Callable[..., BuiltData], tmp_path: Path) -> None:
    with pytest.raises(DataError):
        build([GOOD, {"conversation": 5}])
    assert [path.suffix for path in (tmp_path / "cache" / "datasets").iterdir()] == [".lock"]


def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".key-x1y2").mkdir()
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "train.arrow").write_text("half")
    assert build_once(tmp_path / "key", lambda folder: (folder / REPORT_NAME).write_text("{}") and None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]
    assert [path.name for path in (tmp_path / "key").iterdir()] == [REPORT_NAME]


def _build_slowly(folder: Path, log: Path) -> None:
    def build(staging: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        (staging / REPORT_NAME).write_text("{}")

    build_once(folder, build)


def test_two_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_build_slowly, args=(tmp_path / "c" / "key", tmp_path / "log")) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_large_cached_set_loads_at_once(build: Callable[..., BuiltData]) -> None:
    rows = [pairs((f"question {i}", "an answer of some length " * 4)) for i in range(3000)]
    build(rows)
    start = time.perf_counter()
    built = build(rows)
    assert built.from_cache
    assert time.perf_counter() - start < 1
