"""Pairs of answers -> one batch, chosen first: padded rows, sequences without padding, or prompts computed once.

Legend: P pairs, S = 2 P sequences in the order chosen_0 .. chosen_{P-1}, rejected_0 .. rejected_{P-1}, N answer tokens
that something predicts, R the most of them in a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PairLayout: TypeAlias = Literal["padded", "packed", "shared"]
LAYOUTS: tuple[PairLayout, ...] = ("padded", "packed", "shared")
PAIR_KEYS = frozenset(
    {
        "response_index",
        "response_lengths",
        "predictors",
        "targets",
        "num_tokens",
        "ref_chosen_logps",
        "ref_rejected_logps",
    }
)
"""What a batch holds beside the model's arguments."""

_Ids: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Answer:
    """A whole sequence, of which the first `prompt` tokens are not learnt."""

    ids: _Ids
    prompt: int

    def cut(self, length: int, from_end: bool) -> _Answer:
        lost = max(len(self.ids) - length, 0)
        return (
            _Answer(self.ids[lost:], max(self.prompt - lost, 0))
            if from_end
            else _Answer(self.ids[:length], self.prompt)
        )

    @property
    def learnt(self) -> int:
        return max(len(self.ids) - self.prompt, 0)

    @property
    def predicted(self) -> slice:
        """The answer's tokens but for one at the very beginning, which nothing predicts."""
        return slice(max(self.prompt, 1), len(self.ids))


@dataclass(frozen=True, slots=True)
class PairCollator:
    """Examples with `prompt_ids`, `chosen_ids` and `rejected_ids`, or rows of `store.PAIR_COLUMNS`, -> tensors.

    - the model's: input_ids [S, longest] and attention_mask ("padded"), or input_ids and position_ids [1, tokens] with
      cu_seq_lens and max_length ("packed", "shared"; shared prompts add shared_keys, `models/layout.py`);
    - predictors and targets [N] int64: the flat position that predicts each answer token, and the token;
    - response_index [S, R] int64: where the tokens of a sequence stand among the N, N where there is none;
    - response_lengths [S] int64: answer tokens of each sequence;
    - num_tokens [] int64: tokens of all sequences, prompts twice;
    - ref_chosen_logps, ref_rejected_logps [P] float32 where the examples hold them, or where `reference` does: a table
      [rows, 2] that an example's `row` points into.

    "shared" computes a prompt once where both answers have kept the same. Sequences longer than `max_length` lose
    their end, or with `truncation_mode` "keep_end" their beginning.
    """

    pad_token_id: int
    layout: PairLayout = "padded"
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    reference: NDArray[np.float32] | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs = [self._pair(example) for example in examples]
        sequences = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
        batch = _padded(sequences, self.pad_token_id, self.pad_to_multiple_of or 1)
        if self.layout != "padded":
            batch = _without_padding(pairs, share=self.layout == "shared")
        lengths = [len(range(*s.predicted.indices(len(s.ids)))) for s in sequences]
        index = torch.full((len(sequences), max(lengths)), sum(lengths))
        for row, (start, length) in enumerate(zip(accumulate([0, *lengths]), lengths)):
            index[row, :length] = torch.arange(start, start + length)
        batch = {
            "response_index": index,  # first, for Trainer takes the batch's size from the first tensor
            "response_lengths": torch.tensor([s.learnt for s in sequences]),
            "targets": torch.from_numpy(np.concatenate([s.ids[s.predicted] for s in sequences])),
            "num_tokens": torch.tensor(sum(len(s.ids) for s in sequences)),
            **batch,
        }
        for column, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
            if self.reference is not None:
                batch[name] = torch.from_numpy(self.reference[[int(e["row"]) for e in examples], column])
            elif name in examples[0]:
                batch[name] = torch.tensor([float(example[name]) for example in examples])
        return batch

    def _pair(self, example: Mapping[str, Any]) -> tuple[_Answer, _Answer]:
        prompt, *answers = _parts(example)
        chosen, rejected = (_Answer(np.concatenate([prompt, answer]), len(prompt)) for answer in answers)
        if self.max_length is None:
            return chosen, rejected
        from_end = self.truncation_mode == "keep_end"
        return chosen.cut(self.max_length, from_end), rejected.cut(self.max_length, from_end)


def _parts(example: Mapping[str, Any]) -> list[_Ids]:
    """Prompt, chosen and rejected answer."""
    if "pair_lengths" in example:
        ends = np.cumsum(example["pair_lengths"])[:-1]
        return np.split(np.asarray(example["input_ids"], np.int64), ends)
    return [np.asarray(example[f"{name}_ids"], np.int64) for name in ("prompt", "chosen", "rejected")]


def _padded(sequences: Sequence[_Answer], pad_token_id: int, multiple: int) -> dict[str, Any]:
    longest = -(-max(len(s.ids) for s in sequences) // multiple) * multiple
    input_ids = torch.full((len(sequences), longest), pad_token_id)
    attention_mask = torch.zeros((len(sequences), longest), dtype=torch.int64)
    predictors = []
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence.ids)] = torch.from_numpy(sequence.ids)
        attention_mask[row, : len(sequence.ids)] = 1
        predictors.append(_before(sequence.predicted) + row * longest)
    return {"predictors": _joined(predictors), "input_ids": input_ids, "attention_mask": attention_mask}


def _without_padding(pairs: Sequence[tuple[_Answer, _Answer]], *, share: bool) -> dict[str, Any]:
    """One row. Keys stand twice where a prompt is shared, and else where their tokens do."""
    ids: list[_Ids] = []
    positions: list[_Ids] = []
    keys: list[_Ids] = []
    seconds: list[tuple[_Ids, int]] = []
    predictors: tuple[list[_Ids], list[_Ids]] = ([], [])
    query_ends, key_ends, at = [0], [0], 0
    for chosen, rejected in pairs:
        prompt = rejected.prompt if share and _same_prompt(chosen, rejected) else 0
        start = at
        for side, answer, skip in ((0, chosen, 0), (1, rejected, prompt)):
            here, there = len(answer.ids) - skip, at - skip
            ids.append(answer.ids[skip:])
            positions.append(np.arange(skip, len(answer.ids)))
            before = _before(answer.predicted)
            predictors[side].append(np.where(before < skip, before + start, before + there))
            keys.append(np.arange(start, start + skip))
            keys.append(np.arange(at, at + here))
            if skip:
                seconds.append((np.arange(start, start + skip), key_ends[-1]))
            at += here
            query_ends.append(at)
            key_ends.append(key_ends[-1] + skip + here)
    longest = max(b - a for a, b in pairwise(key_ends))
    batch: dict[str, Any] = {
        "predictors": _joined([*predictors[0], *predictors[1]]),
        "input_ids": _joined(ids)[None],
        "position_ids": _joined(positions)[None],
        "cu_seq_lens_q": torch.tensor(query_ends, dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor(key_ends, dtype=torch.int32),
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if seconds:
        batch["shared_keys"] = _shared_keys(_joined(keys), seconds, at)
    return batch


def _shared_keys(rows: Tensor, seconds: Sequence[tuple[_Ids, int]], tokens: int) -> dict[str, Tensor]:
    """As `SharedKeys` has them. seconds: prompts that stand twice, and where their second keys begin."""
    again = torch.stack([_joined([t for t, _ in seconds]), _joined([k + np.arange(len(t)) for t, k in seconds])])
    is_first = torch.ones(len(rows), dtype=torch.bool)
    is_first[again[1]] = False
    first = torch.empty(tokens, dtype=torch.int64)
    first[rows[is_first]] = is_first.nonzero().flatten()
    return {"rows": rows, "first": first, "again": again}


def _same_prompt(chosen: _Answer, rejected: _Answer) -> bool:
    n = rejected.prompt
    return 0 < n == chosen.prompt and np.array_equal(chosen.ids[:n], rejected.ids[:n])


def _before(tokens: slice) -> _Ids:
    return np.arange(tokens.start, max(tokens.stop, tokens.start)) - 1


def _joined(parts: Sequence[_Ids]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))
