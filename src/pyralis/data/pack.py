"""Packing: several documents or examples in one row, so that no step is spent on padding.

Pretraining text is one stream: documents, an EOS behind each, cut into rows of exactly `max_length`. Attention runs
over the whole row, as in GPT-3's training; `seq_lengths` keeps the boundaries.

Fine-tuning examples are never cut and must not attend to one another: their positions restart at 0, which is how
transformers recognises a packed row. `require_isolation` proves for a given model that it does.
"""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyralis.errors import DataError

IGNORED = -100
Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One row: token ids, labels (both [length] int32), and the lengths of its parts, which sum to `length`."""

    input_ids: Ids
    labels: Ids
    seq_lengths: tuple[int, ...]


def pack_documents(
    documents: Iterable[Sequence[int] | Ids], max_length: int, eos_token_id: int | None
) -> Iterator[PackedRow]:
    """Documents -> rows of exactly `max_length` tokens, the last one shorter; no token is lost.

    `eos_token_id` goes behind each document that does not end with it (None: nothing does). Every token is learnt but
    a row's first, which nothing predicts. Holds one row and one document in memory.
    """
    parts: list[Ids] = []
    room = max_length
    for document in documents:
        ids = closed(np.asarray(document, dtype=np.int32), eos_token_id)
        while len(ids):
            parts.append(ids[:room])
            ids, room = ids[room:], room - len(parts[-1])
            if room == 0:
                yield text_row(parts)
                parts, room = [], max_length
    # a lone token predicts nothing
    if sum(map(len, parts)) > 1:
        yield text_row(parts)


def closed(ids: Ids, eos_token_id: int | None) -> Ids:
    """A document with an EOS behind it, where it does not end with one (None: as it is)."""
    if eos_token_id is None or (len(ids) and ids[-1] == eos_token_id):
        return ids
    return np.append(ids, np.int32(eos_token_id))


def text_row(parts: list[Ids]) -> PackedRow:
    """Parts of documents one behind the other; every token is learnt but the first."""
    input_ids = np.concatenate(parts)
    labels = input_ids.copy()
    labels[0] = IGNORED
    return PackedRow(input_ids, labels, tuple(map(len, parts)))


def bin_pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins that hold at most `capacity`: best fit, longest first (within 11/9 of the best
    possible number of bins + 1; Johnson 1974). Bins and the indices in them are in the order of the indices.

    O(n log capacity): open bins are found by the room that they have left.
    """
    assert all(length <= capacity for length in lengths)
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the sorted keys of by_room
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, lengths[index])
        if at == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[at]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        bins[number].append(index)
        left = room - lengths[index]
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(number)
    return sorted(sorted(indices) for indices in bins)


def pack_examples(examples: Sequence[tuple[Ids, Ids]]) -> PackedRow:
    """Some examples (ids, labels) behind one another; the first label of each is -100: nothing predicts it."""
    labels = [labels.copy() for _, labels in examples]
    for part in labels:
        part[0] = IGNORED
    ids = [ids for ids, _ in examples]
    return PackedRow(np.concatenate(ids), np.concatenate(labels), tuple(map(len, ids)))


def position_ids(seq_lengths: Sequence[int]) -> Ids:
    """Positions that restart at 0 for each part: (3, 2) -> 0 1 2 0 1."""
    return np.concatenate([np.arange(length, dtype=np.int32) for length in seq_lengths])


@torch.no_grad()
def require_isolation(model: torch.nn.Module) -> None:
    """Prove on `model` that packed examples do not see one another, as `Collator` hands them over.

    Two rows of two short random examples each; then the first example of each row is changed. The logits of the
    second ones must stay, up to rounding, and be those of the example alone.

    Raises:
        DataError: the model takes no position_ids, or its attention crosses the boundary (models whose state runs on,
            and FlashAttention with several rows, which transformers unpacks only for a batch of one).
    """
    advice = "Set packing: false."
    base: Any = getattr(model, "get_base_model", lambda: model)()
    name = type(base).__name__
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise DataError(f"packing: {name} takes no position_ids; packed examples cannot be kept apart. {advice}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    first, second, other = torch.randint(0, base.config.get_text_config().vocab_size, (3, 2, 8), generator=generator)
    positions = torch.arange(8).repeat(2, 2)

    def logits(ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=ids.to(device), position_ids=places.to(device), use_cache=False)
        return output.logits[:, -8:].float()

    was_training = model.training
    model.eval()
    try:
        packed = logits(torch.cat((first, second), 1), positions)
        changed = logits(torch.cat((other, second), 1), positions)
        alone = logits(second, positions[:, :8])
    finally:
        model.train(was_training)
    scale = packed.square().mean().sqrt()
    # A masked score weighs exactly 0. Measured on Llama, GPT-2 and Gemma 2 (RMS over that of the logits): `changed` 0,
    # `alone` 3e-7 in float32 and 4e-3 in bfloat16, either one 0.16 to 1.0 where attention leaks.
    for seen in (changed, alone):
        if (packed - seen).square().mean().sqrt() > 0.05 * scale:
            raise DataError(
                f"packing: in {name} packed examples attend to one another. {advice} Or attn_implementation: sdpa."
            )
