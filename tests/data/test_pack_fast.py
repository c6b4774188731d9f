"""A packed row trains as its examples alone do, on the fast path as on the stock one: loss and every gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyralis.data.collate import Collator
from pyralis.data.pack import IGNORED, Ids, bin_pack, pack_examples, position_ids
from pyralis.models.causal_lm import causal_lm_loss
from pyralis.models.surgery import accelerate
from tests.models.test_parity import with_lora
from tests.tiny import build_tiny_model

FAMILIES = ("llama", "qwen3", "gemma2", "mistral")
Batch = dict[str, Tensor]


def examples(count: int, longest: int, vocabulary: int) -> list[tuple[Ids, Ids]]:
    """Documents of uneven lengths, the last part of each learnt."""
    random = np.random.default_rng(0)
    found = []
    for length in random.integers(3, longest, count):
        ids = random.integers(4, vocabulary, length).astype(np.int32)
        labels = np.where(np.arange(length) < random.integers(1, length), IGNORED, ids).astype(np.int32)
        found.append((ids, labels))
    return found


def batches(rows: list[tuple[Ids, Ids]], room: int) -> tuple[Batch, list[Batch]]:
    """All rows packed in one padded batch, and each alone."""
    collate = Collator(pad_token_id=0)
    packed = [pack_examples([rows[i] for i in bin]) for bin in bin_pack([len(ids) for ids, _ in rows], room)]
    assert len(packed) > 1
    features = [
        {"input_ids": row.input_ids, "labels": row.labels, "position_ids": position_ids(row.seq_lengths)}
        for row in packed
    ]
    return collate(features), [collate([{"input_ids": ids, "labels": labels}]) for ids, labels in rows]


def summed(model: Any, parts: list[Batch], device: str) -> tuple[Tensor, Tensor]:
    """(sum of the token losses, its gradient of every trained parameter), float64."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in parts:
        inputs = {key: value.to(device) for key, value in batch.items()}
        loss = causal_lm_loss(model, inputs, inputs.pop("labels"), 1.0)
        loss.backward()
        total += loss.detach().double().cpu()
    trained = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return total, torch.cat([gradient.double().flatten() for gradient in trained]).cpu()


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "stock"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32(family: str, fast: bool) -> None:
    model = with_lora(build_tiny_model(family), some=False)
    if fast:
        assert accelerate(model).fast_layers == 2
    packed, alone = batches(examples(9, 24, 320), 64)
    loss, gradient = summed(model, [packed], "cpu")
    true_loss, true_gradient = summed(model, alone, "cpu")
    assert error(loss, true_loss) < 1e-6
    assert error(gradient, true_gradient) < 5e-6


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "stock"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_packing_adds_no_error(family: str, fast: bool) -> None:
    """The error of a packed row to float32 is that of its examples alone in bfloat16: rounding, and nothing else."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 512}
    model = build_tiny_model(family, **sizes, head_dim=64)
    model = with_lora(model, some=False).cuda()
    packed, alone = batches(examples(24, 160, 512), 512)
    true_loss, true_gradient = summed(model, alone, "cuda")
    model = model.to(torch.bfloat16)
    if fast:
        assert accelerate(model).fast_layers == 2
    loss, gradient = summed(model, [packed], "cuda")
    alone_loss, alone_gradient = summed(model, alone, "cuda")
    assert error(loss, true_loss) < max(2 * error(alone_loss, true_loss), 1e-3)
    assert error(gradient, true_gradient) < 1.5 * error(alone_gradient, true_gradient)
    assert error(gradient, alone_gradient) < error(alone_gradient, true_gradient)
