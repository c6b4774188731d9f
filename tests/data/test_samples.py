"""The sample files: their promises in data/README.md, and that the readers take them as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyralis.data.formats import detect_format, parse_row
from pyralis.data.read import read_rows
from pyralis.data.types import Conversation, PlainText, Preference

ROOT = Path(__file__).parents[2]
IDENTITY = ROOT / "src/pyralis/data/samples/identity.jsonl"
SFT = ROOT / "data/sample_sft.jsonl"
PRETRAIN = (ROOT / "data/pretrain/en.jsonl", ROOT / "data/pretrain/zh.jsonl")
DPO = ROOT / "data/sample_dpo.jsonl"

# What a chat template or a tokenizer might take for a control token.
CONTROL = re.compile(
    r"<\||\|>|</?s>|\[/?INST\]|<<SYS>>|<(bos|eos|pad|unk)>|<(start|end)_of_turn>|[\x00-\x09\x0b-\x1f\ufffd]"
)
ASKS_WHO = re.compile(
    r"who (are you|is this|am i talking to|made you|trained you)|your (name|maker|developer)|"
    r"about yourself|introduce yourself|(are|were) you (chatgpt|smollm|gpt|a robot|a human|a person|created)|"
    r"你是谁|叫什么|怎么称呼|介绍|谁.*你|哪位|你是.*(吗|呀)",
    re.IGNORECASE,
)


def load(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_chinese(text: str) -> bool:
    return re.search(r"[\u4e00-\u9fff]", text) is not None


def turns(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for row in rows:
        for turn in row["conversation"]:
            yield turn["human"], turn["assistant"]


@pytest.mark.parametrize("path", [IDENTITY, SFT], ids=lambda path: path.name)
def test_conversations_are_well_formed_bilingual_and_distinct(path: Path) -> None:
    rows = load(path)
    for row in rows:
        assert {"conversation", "category"} <= set(row) <= {"conversation", "category", "system"}
        assert row.get("system", "x").strip()
        assert row["conversation"]
        for turn in row["conversation"]:
            assert set(turn) == {"human", "assistant"}
            for text in turn.values():
                assert text
                assert text == text.strip()
                assert not CONTROL.search(text), text
    assert len({json.dumps(row["conversation"]) for row in rows}) == len(rows)
    firsts = [(row.get("system"), row["conversation"][0]["human"]) for row in rows]
    assert len(set(firsts)) == len(firsts), "no two conversations begin alike"
    assert len(set(turns(rows))) >= sum(1 for _ in turns(rows)) - 4, "hardly a question and answer comes twice"
    share = sum(is_chinese(row["conversation"][0]["human"]) for row in rows) / len(rows)
    assert 0.45 <= share <= 0.55


def test_identity_is_large_mostly_multi_turn_and_short() -> None:
    rows = load(IDENTITY)
    assert len(rows) >= 96
    assert sum(len(row["conversation"]) > 1 for row in rows) > len(rows) / 2
    assert max(len(row["conversation"]) for row in rows) <= 3
    for _, answer in turns(rows):
        assert len(answer) <= 60 if is_chinese(answer) else len(answer.split()) <= 40, answer


def test_identity_is_given_wherever_it_is_asked_and_nowhere_else() -> None:
    rows = load(IDENTITY)
    identity = [row for row in rows if row["category"] == "identity"]
    everyday = [row for row in rows if row["category"] == "everyday"]
    assert len(identity) + len(everyday) == len(rows)
    assert len(everyday) >= len(rows) / 4, "a model shown nothing but its name says nothing but its name"
    for row in identity:
        assert "Pyralis" in row["conversation"][0]["assistant"], row
    asked = [(question, answer) for question, answer in turns(identity) if ASKS_WHO.search(question)]
    assert len(asked) >= 30
    for question, answer in asked:
        assert "Pyralis" in answer, (question, answer)
    for question, answer in turns(everyday):
        assert "Pyralis" not in question + answer
    answers = [answer for _, answer in turns(identity)]
    assert sum("I am Pyralis" in answer for answer in answers) >= 20
    assert sum("我是 Pyralis" in answer for answer in answers) >= 20


def test_sft_sample_is_varied() -> None:
    rows = load(SFT)
    assert len(rows) == 64
    assert len({row["category"] for row in rows}) >= 40
    assert sum(len(row["conversation"]) > 1 for row in rows) >= 20
    assert sum("system" in row for row in rows) >= 4


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.name)
def test_documents_are_paragraphs_of_their_language(path: Path) -> None:
    rows = load(path)
    assert len(rows) >= 20
    texts = [row["text"] for row in rows]
    assert len(set(texts)) == len(texts)
    for row, text in zip(rows, texts, strict=True):
        assert set(row) == {"text"}
        assert is_chinese(text) == (path.stem == "zh")
        assert len(text) >= (100 if path.stem == "zh" else 380)
        assert not CONTROL.search(text)


def test_preferences_share_their_history_and_differ_in_the_answer() -> None:
    rows = load(DPO)
    assert len(rows) == 48
    assert sum(is_chinese(row["prompt"]) for row in rows) == 24
    assert sum(len(row["chosen"]) > 2 for row in rows) >= 6, "some have a system message or earlier turns"
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected"}
        chosen, rejected = row["chosen"], row["rejected"]
        assert chosen[:-1] == rejected[:-1]
        assert chosen[-1]["content"] != rejected[-1]["content"]
        assert chosen[-1]["role"] == rejected[-1]["role"] == "assistant"
        assert chosen[-2] == {"role": "user", "content": row["prompt"]}
        for message in (*chosen, rejected[-1]):
            assert set(message) == {"role", "content"}
            assert message["content"]
            assert not CONTROL.search(message["content"])
    assert len({row["prompt"] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("path", "expected", "kind"),
    [
        (IDENTITY, "conversation", Conversation),
        (SFT, "conversation", Conversation),
        (PRETRAIN[0], "text", PlainText),
        (DPO, "preference", Preference),
    ],
    ids=["identity", "sft", "pretrain", "dpo"],
)
def test_the_readers_take_every_row(path: Path, expected: str, kind: type) -> None:
    count = 0
    for row, source in read_rows(str(path)):
        assert detect_format(row, source) == expected
        record = parse_row(row, expected, source)
        assert isinstance(record, kind)
        if isinstance(record, Preference):
            assert len(record.chosen) == len(record.rejected) == 1
        count += 1
    assert count == len(load(path))


def test_readme_gives_the_true_numbers() -> None:
    readme = (ROOT / "data/README.md").read_text(encoding="utf-8")
    identity = load(IDENTITY)
    naming = sum(row["category"] == "identity" for row in identity)
    assert f"| {len(identity)} conversations" in readme
    assert f"{naming} conversations say who Pyralis is, {len(identity) - naming} are everyday" in readme
    assert f"| {len(load(SFT))} conversations" in readme
    assert "| " + " + ".join(str(len(load(path))) for path in PRETRAIN) + " documents" in readme
    assert f"| {len(load(DPO))} preference pairs" in readme
    for page in ("README.md", "README.zh-CN.md", "docs/quickstart.md"):
        assert f"{len(identity)} " in (ROOT / page).read_text(encoding="utf-8"), page
