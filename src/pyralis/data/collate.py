"""Examples -> a right-padded batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pyralis.data.pack import IGNORED


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads on the right to the longest example, or up to the next multiple of `pad_to_multiple_of`.

    Takes examples with `input_ids` and `labels`; other columns are left behind. Returns int64 tensors [batch, length]:

    - input_ids, labels (-100 on padding) and attention_mask (1 on tokens, 0 on padding);
    - of packed examples (those with `position_ids`) position_ids in place of the attention mask. The model must be
      called with `use_cache=False`: transformers keeps packed examples apart only without a mask and without a cache.
      Padding gets positions from 0, so that it is a part of its own.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None) -> Collator:
        """With the tokenizer's pad token, else its EOS, else token 0. Padding is told by the mask and the labels,
        never by the token, so that a real EOS is still learnt."""
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(next(token for token in candidates if token is not None), pad_to_multiple_of)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        longest = max(len(example["input_ids"]) for example in examples)
        multiple = self.pad_to_multiple_of or 1
        shape = (len(examples), -(-longest // multiple) * multiple)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORED)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for i, example in enumerate(examples):
            length = len(example["input_ids"])
            input_ids[i, :length] = torch.as_tensor(example["input_ids"])
            labels[i, :length] = torch.as_tensor(example["labels"])
            attention_mask[i, :length] = 1
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels}
        if "position_ids" not in examples[0]:
            return batch | {"attention_mask": attention_mask}
        positions = torch.zeros(shape, dtype=torch.int64)
        for i, example in enumerate(examples):
            length = len(example["input_ids"])
            positions[i, :length] = torch.as_tensor(example["position_ids"])
            positions[i, length:] = torch.arange(shape[1] - length)
        return batch | {"position_ids": positions}


def num_supervised(batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch are learnt: labels other than -100 that a token before them predicts."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
