"""`train_on_responses_only`: labels of a prepared dataset masked but for what stands behind a mark in the text.

The marks are looked for in the text of a row, not among its tokens, which may be cut anywhere. Where a fast tokenizer
makes the same tokens of that text, it says which characters each stands for. Elsewhere (slow tokenizers, a row cut
inside a character) rows are decoded token by token. Tokenizers that lose or add white space do so to the marks too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasets import Dataset
from jinja2.exceptions import TemplateError as JinjaError
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from pyralis.api.notice import notice
from pyralis.data.offsets import Tokenised, tokens_in
from pyralis.data.rendering import Span
from pyralis.errors import DataError, TemplateError

IGNORED = -100
_LONGEST_CHARACTER = 4  # in byte tokens

Masker = Callable[[Mapping[str, Any]], dict[str, list[list[int]]]]


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    return_function: bool = False,
    num_proc: int | None = None,
) -> Any:
    """Let a trainer learn answers only: the text behind each `response_part` up to the next `instruction_part`.

    Args:
        trainer: of TRL or transformers, whose datasets hold `input_ids`; None with return_function.
        instruction_part, response_part: what the chat template writes in front of a user's and of an assistant's text,
            such as "<|im_start|>user\\n" and "<|im_start|>assistant\\n". None takes them from the tokenizer's template.
        force_match: False also accepts marks that differ in the white space at their ends.
        tokenizer: instead of the trainer's.
        return_function: give back the function that masks a batch ({"input_ids": ...} -> {"labels": ...}) instead.
        num_proc: processes to map with.

    Returns:
        The trainer, whose datasets have labels. Rows in which nothing is learnt are left out, and counted in the log.

    Raises:
        DataError: no row has anything to learn, or the datasets are not prepared.
        TemplateError: no marks given, and none to be seen in the template.
    """
    tokenizer = tokenizer or _tokenizer_of(trainer)
    if instruction_part is None or response_part is None:
        found = _marks(tokenizer)
        instruction_part, response_part = instruction_part or found[0], response_part or found[1]
    if not force_match:
        instruction_part, response_part = instruction_part.strip(), response_part.strip()
    if not instruction_part or not response_part:
        raise TemplateError("instruction_part and response_part must not be empty: they are looked for in the text.")
    mask = _masker(tokenizer, instruction_part, response_part)
    if return_function:
        return mask

    def masked(dataset: Any, name: str) -> Any:
        return _masked(dataset, name, mask, (instruction_part, response_part), tokenizer, num_proc)

    if trainer.train_dataset is not None:
        trainer.train_dataset = masked(trainer.train_dataset, "train_dataset")
    if isinstance(trainer.eval_dataset, dict):
        trainer.eval_dataset = {key: masked(one, f"eval_dataset[{key!r}]") for key, one in trainer.eval_dataset.items()}
    elif trainer.eval_dataset is not None:
        trainer.eval_dataset = masked(trainer.eval_dataset, "eval_dataset")
    _keep_labels(trainer, tokenizer)
    return trainer


def _masked(
    dataset: Any,
    name: str,
    mask: Masker,
    marks: tuple[str, str],
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int | None,
) -> Any:
    first = next(iter(dataset), None)
    if first is None:
        return dataset
    if "input_ids" not in first:
        raise DataError(
            f"the trainer's {name} has no input_ids but {', '.join(first)}: it is not prepared. Give the trainer a "
            "dataset that it tokenises (not skip_prepare_dataset), or one that is tokenised."
        )
    if not isinstance(dataset, Dataset):  # a stream: nothing can be counted
        return dataset.map(mask, batched=True).filter(lambda row: any(label != IGNORED for label in row["labels"][1:]))
    labelled = dataset.map(mask, batched=True, num_proc=num_proc, desc=f"finding the answers of {name}")
    learns = [any(label != IGNORED for label in labels[1:]) for labels in labelled["labels"]]
    if not any(learns):
        raise DataError(
            f"in no row of {name} is there anything to learn: {marks[1]!r} (response_part) with text behind it is not "
            f"found. Is it written as the chat template does? A row of {name} begins: "
            f"{tokenizer.decode(first['input_ids'][:200])[:300]!r}"
        )
    if not all(learns):
        notice(
            f"{learns.count(False)} of {len(learns)} rows of {name} have nothing to learn and are left out: no answer, "
            "or cut off before it"
        )
        labelled = labelled.select([at for at, learnt in enumerate(learns) if learnt])
    return labelled


def _masker(tokenizer: PreTrainedTokenizerBase, instruction_part: str, response_part: str) -> Masker:
    marks = _pattern(instruction_part, tokenizer), _pattern(response_part, tokenizer)

    def labels_of(ids: list[int], known: Tokenised | None) -> list[int]:
        row = _decoded(ids, tokenizer) if known is None else known
        learnt = tokens_in(list(_answers(row.text, *marks)), row, tokenizer)
        return [token if on else IGNORED for token, on in zip(ids, learnt, strict=True)]

    def mask(rows: Mapping[str, Any]) -> dict[str, list[list[int]]]:
        batch = [list(map(int, ids)) for ids in rows["input_ids"]]
        labels = [labels_of(ids, known) for ids, known in zip(batch, _tokenised_again(batch, tokenizer))]
        if (before := rows.get("labels")) is not None:  # what was masked already stays so
            labels = [[new if old != IGNORED else IGNORED for new, old in zip(*pair)] for pair in zip(labels, before)]
        return {"labels": labels}

    return mask


def _tokenised_again(batch: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[Tokenised | None]:
    """Each row with the characters of its tokens; None where its text does not give these tokens again."""
    if not tokenizer.is_fast or not batch:
        return [None] * len(batch)
    texts = [_decode(ids, tokenizer) for ids in batch]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    rows = zip(batch, texts, encoded["input_ids"], encoded["offset_mapping"])
    return [Tokenised(text, ids, offsets) if ids == again else None for ids, text, again, offsets in rows]


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Tokenised:
    """A row decoded token by token, each with the one before it, on which its text may depend."""
    text, offsets, before, shown = "", [], 0, 0
    for position in range(1, len(ids) + 1):
        whole = _decode(ids[before:position], tokenizer)
        inside_character = whole.endswith("\ufffd") and position - shown < _LONGEST_CHARACTER
        if inside_character and position < len(ids):
            continue
        piece = whole[len(_decode(ids[before:shown], tokenizer)) :]
        offsets += [(len(text), len(text) + len(piece))] * (position - shown)
        text, before, shown = text + piece, shown, position
    return Tokenised(text, ids, offsets)


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _pattern(mark: str, tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """The mark as it stands in decoded rows: exactly, or with white space where the tokenizer puts or loses some, and
    with what it makes of characters that it does not know."""
    decoded = _decode(tokenizer(mark, add_special_tokens=False)["input_ids"], tokenizer)
    return re.compile(re.escape(mark) if decoded == mark else f"{_loosely(mark)}|{_loosely(decoded)}")


def _loosely(mark: str) -> str:
    """With any white space between characters, and at most as much as the mark has at its end."""
    return r"\s*".join(map(re.escape, "".join(mark.split()))) + rf"\s{{0,{len(mark) - len(mark.rstrip())}}}"


def _answers(text: str, instruction: re.Pattern[str], response: re.Pattern[str]) -> Iterator[Span]:
    """From behind each response mark to the next instruction mark, or the end; no span is empty."""
    turn, position = 0, 0
    while (mark := response.search(text, position)) is not None:
        following = instruction.search(text, mark.end())
        position = len(text) if following is None else following.start()
        if position > mark.end():
            yield Span(mark.end(), position, turn)
            turn += 1


def _marks(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the tokenizer's template writes in front of a user's and of an assistant's text in the middle of a chat."""
    words = ("\ue000", "\ue001", "\ue002", "\ue003")
    turns = [{"role": ("user", "assistant")[at % 2], "content": word} for at, word in enumerate(words)]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        places = [text.index(word) for word in words]
    except (JinjaError, ValueError, TypeError, LookupError) as error:
        raise TemplateError(
            "instruction_part and response_part are not given, and the tokenizer's chat template does not show them "
            f"({error}). Give both, as the template writes them."
        ) from error
    instruction, response = text[places[1] + 1 : places[2]], text[places[2] + 1 : places[3]]
    end = text[places[3] + 1 :]  # of an answer, which is learnt
    if response != text[places[0] + 1 : places[1]] or instruction in ("", end):
        raise TemplateError(
            "instruction_part and response_part are not given, and the tokenizer's chat template writes turns in "
            "different ways. Give both, as the template writes them."
        )
    return instruction.removeprefix(end), response.removeprefix(end) or response


def _tokenizer_of(trainer: Any) -> PreTrainedTokenizerBase:
    found = getattr(trainer, "processing_class", None) or getattr(trainer, "tokenizer", None)
    if found is None:
        raise TemplateError("the trainer has no tokenizer: give it with tokenizer=.")
    return getattr(found, "tokenizer", found)


def _keep_labels(trainer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers' collator for language modelling makes labels of its own: one that pads those that are there."""
    if type(trainer.data_collator) is DataCollatorForLanguageModeling:
        from transformers import DataCollatorForSeq2Seq

        trainer.data_collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)
