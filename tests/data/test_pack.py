"""Packing keeps every token, and packed examples train exactly as they would apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pyralis.data.collate import Collator
from pyralis.data.pack import IGNORED, bin_pack, pack_documents, pack_examples, position_ids, require_isolation
from pyralis.errors import DataError

EOS = 2
documents = st.lists(st.lists(st.integers(3, 99), max_size=30), max_size=20)


@given(documents, st.integers(2, 16))
def test_documents_lose_no_token(docs: list[list[int]], max_length: int) -> None:
    rows = list(pack_documents(docs, max_length, EOS))
    stream = [token for doc in docs for token in (*doc, EOS)]
    packed = [token for row in rows for token in row.input_ids.tolist()]
    # all but a lone last token, which would predict nothing
    assert packed == (stream[:-1] if len(stream) % max_length == 1 else stream)
    assert all(len(row.input_ids) == max_length for row in rows[:-1])
    for row in rows:
        assert row.labels.tolist() == [IGNORED, *row.input_ids[1:].tolist()]
        assert sum(row.seq_lengths) == len(row.input_ids) <= max_length
        ends = np.cumsum(row.seq_lengths) - 1
        assert all(row.input_ids[end] == EOS for end in ends[:-1]), "a boundary is behind an EOS"


def test_documents_by_hand() -> None:
    rows = list(pack_documents([[5, 6, 7], [], [8, EOS], [9, 10, 11, 12]], 4, EOS))
    assert [(row.input_ids.tolist(), row.seq_lengths) for row in rows] == [
        ([5, 6, 7, EOS], (4,)),
        ([EOS, 8, EOS, 9], (1, 2, 1)),
        ([10, 11, 12, EOS], (4,)),
    ]
    without_eos = list(pack_documents([[5, 6, 7], [8, 9]], 4, None))
    assert [row.seq_lengths for row in without_eos] == [(3, 1)]


@given(st.lists(st.integers(1, 50), max_size=200))
def test_bins_hold_each_example_once_and_are_well_filled(lengths: list[int]) -> None:
    bins = bin_pack(lengths, 50)
    assert sorted(index for indices in bins for index in indices) == list(range(len(lengths)))
    fills = [sum(lengths[index] for index in indices) for indices in bins]
    assert all(fill <= 50 for fill in fills)
    assert sum(fill <= 25 for fill in fills) <= 1, "two half-empty bins would have been one"
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 50) + max(1, sum(length > 25 for length in lengths))
    assert bins == sorted(bins)


def test_a_hundred_thousand_examples_are_packed_well() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 100_000).clip(10, 2048).astype(int).tolist()
    bins = bin_pack(lengths, 2048)
    assert sum(lengths) / (len(bins) * 2048) > 0.995


def test_positions_restart() -> None:
    assert position_ids((3, 1, 2)).tolist() == [0, 1, 2, 0, 0, 1]


def tiny_llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def summed_loss_and_gradient(model: Any, batches: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        targets = batch["labels"][:, 1:].flatten()
        total = total + torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    total.backward()
    return total.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_train_as_if_apart(attention: str) -> None:
    """Two rows of several examples, of different fill, against each example on its own: loss and every gradient."""
    model = tiny_llama(attention)
    rng = np.random.default_rng(1)
    examples = []
    for length in (7, 12, 5, 9, 3):
        ids = rng.integers(3, 97, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 2, IGNORED, ids).astype(np.int32)
        examples.append((ids, labels))
    rows = [pack_examples(examples[:3]), pack_examples(examples[3:])]
    features = [
        {"input_ids": row.input_ids, "labels": row.labels, "position_ids": position_ids(row.seq_lengths)}
        for row in rows
    ]
    collate = Collator(pad_token_id=0, pad_to_multiple_of=8)
    packed_loss, packed_gradient = summed_loss_and_gradient(model, [collate(features)])
    apart = [collate([{"input_ids": ids, "labels": labels}]) for ids, labels in examples]
    loss, gradient = summed_loss_and_gradient(model, apart)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(packed_gradient, gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_isolation_is_proved(attention: str, dtype: torch.dtype) -> None:
    model = tiny_llama(attention).to(dtype).train()
    require_isolation(model)
    assert model.training


def test_isolation_of_learned_positions() -> None:
    torch.manual_seed(0)
    require_isolation(GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_leaks_is_refused(dtype: torch.dtype) -> None:
    class Leaky(LlamaForCausalLM):
        def forward(self, input_ids: Any, position_ids: Any, use_cache: bool) -> Any:  # type: ignore[override]
            return super().forward(input_ids=input_ids, use_cache=use_cache)

    torch.manual_seed(0)
    model = Leaky(tiny_llama("sdpa").config).to(dtype)
    with pytest.raises(DataError, match="packed examples attend to one another"):
        require_isolation(model)


def test_a_model_without_positions_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(DataError, match="BloomForCausalLM takes no position_ids"):
        require_isolation(model)
