"""Tables and conversations in every spelling -> conversations -> text."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset

from pyralis import apply_chat_template, standardize_sharegpt, to_sharegpt
from pyralis.errors import DataError, TemplateError
from tests.tiny import make_tiny_tokenizer

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TABLE = Dataset.from_dict(
    {"name": ["Ann", "Bob", "Cy"], "age": [3, None, 5], "note": ["x", "", " "], "output": ["yes", "no", None]}
)


@pytest.mark.parametrize(
    ("column", "turns"),
    [
        ("conversations", [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]),
        ("conversations", [{"role": "User", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]),
        ("messages", [{"from": "input", "value": "Hi"}, {"from": "output", "value": "Hello"}]),
        ("conversation", [{"human": "Hi", "assistant": "Hello"}]),
    ],
)
def test_every_spelling(column: str, turns: list[dict[str, str]]) -> None:
    rows = [{column: turns, "id": 7}] * 2
    for dataset in (Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows))):
        standard = standardize_sharegpt(dataset, make_tiny_tokenizer())
        assert [row[column] for row in standard] == [TURNS, TURNS]
        assert [row["id"] for row in standard] == [7, 7]
        assert list(standardize_sharegpt(standard)) == list(standard)


def test_aliases() -> None:
    dataset = Dataset.from_list(
        [{"conversations": [{"from": "pupil", "value": "Hi"}, {"from": "elf", "value": "Hello"}]}]
    )
    standard = standardize_sharegpt(dataset, aliases_for_user=["pupil"], aliases_for_assistant=["elf"])
    assert standard[0]["conversations"] == TURNS
    with pytest.raises(DataError, match=r"dataset:0: conversations\[0\]\.from is 'pupil'"):
        standardize_sharegpt(dataset)
    with pytest.raises(DataError, match="there is no column conversations or messages"):
        standardize_sharegpt(TABLE)


def test_rows_become_conversations() -> None:
    made = to_sharegpt(TABLE, "I am {name}.[[ I am {age}.]][[ {note}!]]")
    assert made.column_names == ["conversations"]
    assert [row[0]["value"] for row in made["conversations"]] == [
        "I am Ann. I am 3. x!",
        "I am Bob.",
        "I am Cy. I am 5.",
    ]
    assert [row[1] for row in made["conversations"]] == [{"from": "gpt", "value": v} for v in ("yes", "no", "")]
    kept = to_sharegpt(TABLE, "{name}", remove_unused_columns=False)
    assert kept.column_names == [*TABLE.column_names, "conversations"]
    assert to_sharegpt(TABLE, merged_column_name="name")[0]["conversations"][0]["value"] == "Ann"
    with pytest.raises(DataError, match=r"no column 'nmae'; the dataset has name, age"):
        to_sharegpt(TABLE, "{nmae}")
    with pytest.raises(DataError, match="expected 1 or more"):
        to_sharegpt(TABLE, "{name}", conversation_extension=0)


def test_rows_drawn_together() -> None:
    made = to_sharegpt(TABLE, "{name}", conversation_extension=3)
    assert [len(row) for row in made["conversations"]] == [6, 6, 6]
    assert [row[0]["value"] for row in made["conversations"]] == ["Ann", "Bob", "Cy"]
    for turn in (2, 4):
        assert sorted(row[turn]["value"] for row in made["conversations"]) == ["Ann", "Bob", "Cy"]
    assert made.to_list() == to_sharegpt(TABLE, "{name}", conversation_extension=3).to_list()


def test_a_template_by_example() -> None:
    tokenizer = make_tiny_tokenizer()
    made = apply_chat_template(standardize_sharegpt(to_sharegpt(TABLE, "{name}", conversation_extension=2)), tokenizer)
    first = made[0]["conversations"]
    names, answers = [turn["content"] for turn in first[::2]], [turn["content"] for turn in first[1::2]]
    turns = [f"### Instruction:\n{name}\n\n### Response:\n{answer}<|im_end|>" for name, answer in zip(names, answers)]
    expected = (
        "Below are some instructions that describe some tasks. Write responses that appropriately complete each "
        "request.\n\n" + "\n\n".join(turns)
    )
    assert made[0]["text"].rstrip("\n") == expected
    assert tokenizer.apply_chat_template(first, tokenize=False) == made[0]["text"]


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ("{SYSTEM}\nQ: {INPUT}\nA: {OUTPUT}\nQ: {INPUT}\nA: {OUTPUT}", "Be brief.\nQ: Hi\nA: Hello<|im_end|>"),
        ("Chat.\n>{INPUT}<{OUTPUT}>{INPUT}<{OUTPUT}", "Chat.\n>Hi<Hello<|im_end|>"),
        ("[{INPUT}]{OUTPUT}<|im_end|>[{INPUT}]{OUTPUT}<|im_end|>", "[Hi]Hello<|im_end|>"),
    ],
)
def test_examples(example: str, expected: str) -> None:
    dataset = Dataset.from_list([{"messages": TURNS}, {"messages": [{"role": "user", "content": "Hi"}]}])
    tokenizer = make_tiny_tokenizer()
    made = apply_chat_template(dataset, tokenizer, example, "Be brief.", extra_eos_tokens=["x"])
    assert made[0]["text"].rstrip("\n") == expected
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == made[0]["text"]


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        ("{INPUT}{OUTPUT}", "must show two turns"),
        ("{OUTPUT}{INPUT}{OUTPUT}{INPUT}", "must show two turns"),
        ("{INPUT}{SYSTEM}{OUTPUT}{INPUT}{OUTPUT}", "must show two turns"),
        ("{INPUT}a{OUTPUT}{INPUT}b{OUTPUT}", "in front of the first answer"),
        ("{INPUT}a{OUTPUT}{INPUT}a{OUTPUT}the end", "behind the last answer"),
    ],
)
def test_examples_that_are_none(example: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        apply_chat_template(Dataset.from_list([{"messages": TURNS}]), make_tiny_tokenizer(), example)
