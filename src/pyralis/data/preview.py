"""What the model will see and learn, row by row, on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from pyralis.data.pack import IGNORED

# Longer stretches are shown by their two ends.
STRETCH_CHARACTERS = 1200
STRETCHES = 80

# by (learnt, special)
STYLES = {
    (True, False): "green",
    (True, True): "bold reverse green",
    (False, False): "dim",
    (False, True): "magenta",
}
# line breaks and tabs stay
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Text that is learnt, or not, as one piece; of special tokens, or not."""

    text: str
    learnt: bool
    special: bool = False


def stretches(input_ids: Iterable[int], labels: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> list[Stretch]:
    """A row's text in stretches that are learnt or not, special tokens apart, from the very ids and labels that are
    trained on.

    Each stretch is the growth of the decoded text, since tokens decode differently on their own (SentencePiece drops
    a leading space; a character may need several tokens).
    """
    ids = [int(token) for token in input_ids]
    found: list[Stretch] = []
    shown, end = "", 0
    special_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    kinds = [(int(label) != IGNORED, token in special_ids) for token, label in zip(ids, labels, strict=True)]
    for (learnt, special), group in groupby(kinds):
        end += len(list(group))
        whole = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(whole, str)
        if end < len(ids):
            whole = whole.rstrip("\ufffd")  # a character that goes on in the next stretch
        if len(whole) > len(shown):
            found.append(Stretch(whole[len(shown) :], learnt, special))
            shown = whole
    return found


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


@dataclass(frozen=True, slots=True)
class _LearntText:
    """Learnt text in green and the rest dim, special tokens standing out; without colours learnt text stands between
    【 and 】. The parts are `shortened`, so that no row can steer the terminal."""

    parts: tuple[Stretch, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        coloured = _coloured(console)
        text = Text()
        for learnt, group in groupby(self.parts, key=lambda part: part.learnt):
            if coloured:
                for part in group:
                    text.append(part.text, STYLES[learnt, part.special])
            else:
                plain = "".join(part.text for part in group)
                text.append(f"【{plain}】" if learnt else plain)
        yield text


@dataclass(frozen=True, slots=True)
class _Legend:
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        if _coloured(console):
            yield Text.assemble(
                ("Learnt text is green", STYLES[True, False]),
                ", ",
                ("its special tokens on green", STYLES[True, True]),
                ("; what it follows is dim, ", STYLES[False, False]),
                ("its special tokens magenta", STYLES[False, True]),
                ".",
            )
        else:
            yield Text("Learnt text stands between 【 and 】.")


@dataclass(frozen=True, slots=True)
class ShownRow:
    """What a row is, in words, and its text."""

    title: str
    parts: tuple[Stretch, ...]


def shown_rows(rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, count: int) -> Iterator[ShownRow]:
    """The first `count` rows of a built dataset; of pairs, each answer."""
    for number, row in zip(range(1, count + 1), rows):
        texts = _pair(row) if "pair_lengths" in row else (_whole(row),)
        for title, ids, labels in texts:
            yield ShownRow(f"row {number}: {title}", tuple(stretches(ids, labels, tokenizer)))


def shortened(row: ShownRow) -> ShownRow:
    """Long stretches by their two ends, and not too many of them; control characters as their pictures."""
    parts = [Stretch(_shortened(p.text.translate(_PICTURES)), p.learnt, p.special) for p in row.parts[:STRETCHES]]
    if len(row.parts) > STRETCHES:
        parts.append(Stretch(f"\n... and {len(row.parts) - STRETCHES} stretches more", False))
    return ShownRow(row.title, tuple(parts))


def preview(rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, count: int = 3) -> RenderableType:
    """The first `count` rows of a built dataset, with what is learnt marked."""
    parts: list[RenderableType] = [_Legend()]
    for row in shown_rows(rows, tokenizer, count):
        parts.append(Rule(Text(row.title), align="left", characters="─", style="dim"))
        parts.append(_LearntText(shortened(row).parts))
    return Group(*parts)


def _whole(row: Mapping[str, Any]) -> tuple[str, Any, Any]:
    learnt = sum(int(label) != IGNORED for label in row["labels"])
    parts_of_row = len(row.get("seq_lengths", ()))
    packed = f", {parts_of_row} parts" if parts_of_row > 1 else ""
    return f"{len(row['input_ids'])} tokens, {learnt} learnt{packed}", row["input_ids"], row["labels"]


def _pair(row: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The prompt with each answer."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    prompt, chosen, rejected = map(int, row["pair_lengths"])
    start = prompt
    for name, length in (("chosen", chosen), ("rejected", rejected)):
        answer = slice(start, start + length)
        title = f"{name}, {prompt + length} tokens, {length} learnt"
        yield title, ids[:prompt] + ids[answer], labels[:prompt] + labels[answer]
        start += length


def _shortened(text: str) -> str:
    if len(text) <= STRETCH_CHARACTERS:
        return text
    half = STRETCH_CHARACTERS // 2
    return f"{text[:half]} ... ({len(text) - 2 * half:,} characters) ... {text[-half:]}"
