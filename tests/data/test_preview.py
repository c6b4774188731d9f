"""The preview shows exactly what is learnt, with and without colours."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pyralis.data.preview import STRETCH_CHARACTERS, Stretch, preview, stretches

IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("[/INST]", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core)


def row(tokenizer: PreTrainedTokenizerFast, *parts: tuple[str, bool]) -> dict[str, Any]:
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt in parts:
        new = tokenizer(text)["input_ids"]
        ids += new
        labels += new if learnt else [IGNORED] * len(new)
    return {"input_ids": ids, "labels": labels}


def shown(renderable: Any, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=80, **options)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_stretches_follow_the_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    example = row(tokenizer, ("你好[/INST]", False), (" Hello 😀", True), ("\nAnd?[/INST]", False), ("Bye", True))
    assert stretches(example["input_ids"], example["labels"], tokenizer) == [
        Stretch("你好", False),
        Stretch("[/INST]", False, special=True),
        Stretch(" Hello 😀", True),
        Stretch("\nAnd?", False),
        Stretch("[/INST]", False, special=True),
        Stretch("Bye", True),
    ]


def test_a_character_across_the_edge_is_shown_once(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a你b")["input_ids"]
    labels = [IGNORED, IGNORED, *ids[2:]]
    assert stretches(ids, labels, tokenizer) == [Stretch("a", False), Stretch("你b", True)]


def test_with_and_without_colours(tokenizer: PreTrainedTokenizerFast) -> None:
    example = row(tokenizer, ("Hi [bold]x[/INST]", False), ("Hello", True))
    plain = shown(preview([example, example], tokenizer, 1), color_system=None)
    assert "Hi [bold]x[/INST]【Hello】" in plain
    assert "row 1: 16 tokens, 5 learnt" in plain
    assert "row 2" not in plain
    coloured = shown(preview([example], tokenizer), color_system="standard", force_terminal=True)
    assert "\x1b[32mHello\x1b[0m" in coloured
    assert "\x1b[35m[/INST]\x1b[0m" in coloured
    assert "【" not in coloured


def test_a_pipe_gets_every_character(tokenizer: PreTrainedTokenizerFast) -> None:
    example = row(tokenizer, ("Q", False), ("安全准则" * 50, True))
    assert f"Q【{'安全准则' * 50}】" in shown(preview([example], tokenizer), color_system=None, soft_wrap=True)


def test_packed_and_long_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    example = row(tokenizer, ("q" * (3 * STRETCH_CHARACTERS), False), ("end", True))
    text = shown(preview([{**example, "seq_lengths": [2000, 1603]}], tokenizer), color_system=None)
    assert "2 parts" in text
    assert f"({2 * STRETCH_CHARACTERS:,} characters)" in text.replace("\n", " ")
    assert "【end】" in text


def test_learnt_special_tokens_stand_out(tokenizer: PreTrainedTokenizerFast) -> None:
    example = row(tokenizer, ("Q", False), ("A[/INST]", True))
    assert "Q【A[/INST]】" in shown(preview([example], tokenizer), color_system=None)
    coloured = shown(preview([example], tokenizer), color_system="standard", force_terminal=True)
    assert "\x1b[32mA\x1b[0m\x1b[1;7;32m[/INST]\x1b[0m" in coloured


def test_no_row_steers_the_terminal(tokenizer: PreTrainedTokenizerFast) -> None:
    example = row(tokenizer, ("\x1b[2J\r\x9b1m\x7f", False), ("a\tb\nc", True))
    output = shown(preview([example], tokenizer), color_system=None)
    assert "\u241b[2J\u240d\ufffd1m\u2421【a" in output
    assert not {"\x1b", "\r", "\x9b", "\x7f"} & set(output)
