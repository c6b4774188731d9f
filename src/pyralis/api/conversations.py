"""Rows brought into conversations, and conversations into text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from pyralis.api.notice import without_effect
from pyralis.data.messages import ROLES, messages_of
from pyralis.data.named_rendering import NamedTemplate
from pyralis.data.named_templates import TemplateSpec
from pyralis.data.types import Source
from pyralis.errors import DataError, TemplateError

CONVERSATIONS = "conversations"
_COLUMNS = (CONVERSATIONS, "messages", "conversation")
_FIELD = re.compile(r"\{(\w[\w\- ]*)\}")
_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)

ALPACA = (
    "{SYSTEM}\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}"
    "\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}"
)
ALPACA_SYSTEM = (
    "Below are some instructions that describe some tasks. Write responses that appropriately complete each request."
)


def standardize_sharegpt(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """Every conversation as a list of {"role", "content"}, whatever keys and roles it was spelt with.

    Args:
        dataset: with a column conversations, messages or conversation, which keeps its name. It may be a stream.
        tokenizer: not needed; scripts pass it.

    Raises:
        DataError: no such column, or a turn that cannot be understood; it names the row.
    """
    column = _column(dataset)
    roles = {**ROLES, **dict.fromkeys(aliases_for_system, "system"), **dict.fromkeys(aliases_for_user, "user")}
    roles |= dict.fromkeys(aliases_for_assistant, "assistant")

    def standardize(rows: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        return {column: [_standard(turns, roles, Source("dataset", at)) for turns, at in zip(rows[column], indices)]}

    options = {} if num_proc is None or not isinstance(dataset, Dataset) else {"num_proc": num_proc}
    return dataset.map(standardize, batched=True, batch_size=batch_size, with_indices=True, **options)


def to_sharegpt(
    dataset: Dataset,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Dataset:
    """Rows of a table as conversations: the user says `merged_prompt`, filled, and the assistant the output column.

    Args:
        merged_prompt: text with {column}; "" is the column `merged_column_name`. A part in [[ ]] is left out of a row
            in which a column that it names is empty.
        conversation_extension: how many rows, drawn at random, become the turns of one conversation.

    Returns:
        A dataset with the column "conversations" of {"from": "human" or "gpt", "value"}.

    Raises:
        DataError: a column that is not there.
    """
    prompt = merged_prompt or f"{{{merged_column_name}}}"
    for name in [*_FIELD.findall(prompt), output_column_name]:
        if name not in dataset.column_names:
            raise DataError(f"there is no column {name!r}; the dataset has {', '.join(dataset.column_names)}.")
    if conversation_extension < 1:
        raise DataError(f"conversation_extension is {conversation_extension}; expected 1 or more.")
    fill = _filler(prompt)

    def pair(row: Mapping[str, Any]) -> dict[str, Any]:
        answer = row[output_column_name]
        turns = [{"from": "human", "value": fill(row)}, {"from": "gpt", "value": "" if answer is None else str(answer)}]
        return {CONVERSATIONS: turns}

    unused = [name for name in dataset.column_names if remove_unused_columns or name == CONVERSATIONS]
    single = dataset.map(pair, remove_columns=unused)
    if conversation_extension == 1:
        return single
    others = [
        single.shuffle(seed=random_state + number)
        .select_columns(CONVERSATIONS)
        .rename_column(CONVERSATIONS, f"+{number}")
        for number in range(1, conversation_extension)
    ]
    together = concatenate_datasets([single, *others], axis=1)
    names = [f"+{number}" for number in range(1, conversation_extension)]
    return together.map(
        lambda row: {CONVERSATIONS: sum((row[name] for name in names), list(row[CONVERSATIONS]))}, remove_columns=names
    )


def apply_chat_template(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str = ALPACA,
    default_system_message: str = ALPACA_SYSTEM,
    extra_eos_tokens: Sequence[str] | None = None,
) -> Any:
    """Write every conversation as text by a template given as an example of two turns, and make it the tokenizer's own.

    Args:
        dataset: with a column of conversations, in any spelling.
        chat_template: text with {INPUT} and {OUTPUT} twice each, and perhaps {SYSTEM} in front. Each answer ends with
            the tokenizer's EOS.
        default_system_message: what {SYSTEM} is where a conversation has no system message.

    Returns:
        The dataset with a column "text".

    Raises:
        TemplateError: a template that is not of that form, or a tokenizer without EOS.
    """
    if extra_eos_tokens:
        without_effect({"extra_eos_tokens": "an answer ends with the tokenizer's EOS"})
    spec = _spec_of_example(chat_template, str(tokenizer.eos_token or ""))
    system = default_system_message if "{SYSTEM}" in chat_template else ""
    template = NamedTemplate(spec, eos=tokenizer.eos_token, system=system)
    tokenizer.chat_template = template.jinja
    column = _column(dataset)

    def write(row: Mapping[str, Any], index: int) -> dict[str, str]:
        return {"text": template.render(messages_of(row[column], column, Source("dataset", index)), spans="none").text}

    return dataset.map(write, with_indices=True)


def _column(dataset: Any) -> str:
    names = dataset.column_names or list(next(iter(dataset), {}))
    for name in _COLUMNS:
        if name in names:
            return name
    raise DataError(f"there is no column {' or '.join(_COLUMNS)}; the dataset has {', '.join(names)}.")


def _standard(turns: Any, roles: Mapping[str, str], source: Source) -> list[dict[str, str]]:
    """By the aliases where turns have roles; Firefly's pairs have none."""
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        key = next((name for name in ("from", "role") if name in turns[0]), None)
        if key is not None:
            turns = [
                {**turn, key: roles.get(str(turn.get(key)).lower(), turn.get(key))} if isinstance(turn, dict) else turn
                for turn in turns
            ]
    return [{"role": message.role, "content": message.content} for message in messages_of(turns, CONVERSATIONS, source)]


def _filler(prompt: str) -> Callable[[Mapping[str, Any]], str]:
    def empty(row: Mapping[str, Any], name: str) -> bool:
        return row[name] is None or not str(row[name]).strip()

    def fill(row: Mapping[str, Any]) -> str:
        kept = _OPTIONAL.sub(
            lambda part: "" if any(empty(row, n) for n in _FIELD.findall(part[1])) else part[1], prompt
        )
        return _FIELD.sub(lambda name: "" if row[name[1]] is None else str(row[name[1]]), kept)

    return fill


def _spec_of_example(example: str, eos: str) -> TemplateSpec:
    """The template that writes two turns as `example` shows them."""
    parts = re.split(r"\{INPUT\}|\{OUTPUT\}", example)
    marks = re.findall(r"\{INPUT\}|\{OUTPUT\}", example)
    if marks != ["{INPUT}", "{OUTPUT}"] * 2 or example.count("{SYSTEM}") > 1 or "{SYSTEM}" in "".join(parts[1:]):
        raise TemplateError(
            "chat_template must show two turns: {INPUT} and {OUTPUT} twice each, in turns, and {SYSTEM} at most once, "
            f"in front of them. Given: {example[:200]!r}"
        )
    lead, header, between, again, tail = (part.replace(eos, "") if eos else part for part in parts)
    if header != again:
        raise TemplateError(
            f"chat_template puts {header!r} in front of the first answer and {again!r} before the second."
        )
    if tail.strip():
        raise TemplateError(f"chat_template has {tail!r} behind the last answer; expected nothing there, or EOS.")
    room = lead.partition("{SYSTEM}")[2] if "{SYSTEM}" in lead else lead
    size = next(
        size for size in range(min(len(room), len(between)), -1, -1) if room.endswith(between[len(between) - size :])
    )
    user, after = between[len(between) - size :], between[: len(between) - size]
    front = lead[: len(lead) - size]
    answer = header[len(header.rstrip(" ")) :] + "{content}"  # a space belongs to the answer's first token
    fixed = "{SYSTEM}" not in front
    return TemplateSpec(
        name="example",
        bos=front if fixed else "",
        system="{content}\n\n" if fixed else front.replace("{SYSTEM}", "{content}"),
        user=user + "{content}",
        header=header.rstrip(" "),
        answer=answer,
        stop=None,
        after=after,
    )
