"""A batch of pairs, however it is laid out, asks a model for the same log-probabilities."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pyralis.data.pairs import LAYOUTS, PAIR_KEYS, PairCollator
from pyralis.errors import ModelError
from pyralis.models.families import FAMILIES
from pyralis.models.logprobs import causal_lm_logprobs
from pyralis.models.surgery import accelerate
from tests.tiny import build_tiny_model, build_tiny_variant

EVERY = tuple(family.name for family in FAMILIES)


def example(prompt: int, chosen: int, rejected: int, seed: int = 0) -> dict[str, Any]:
    tokens = torch.randint(
        4, 300, (prompt + chosen + rejected,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return {
        "prompt_ids": tokens[:prompt],
        "chosen_ids": tokens[prompt : prompt + chosen],
        "rejected_ids": tokens[prompt + chosen :],
    }


EXAMPLES = [example(7, 5, 9), example(3, 1, 12, 1), example(20, 8, 2, 2)]


def arguments(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in PAIR_KEYS}


def by_sequence(batch: dict[str, Any], values: Tensor) -> list[list[float]]:
    padded = torch.cat([values, values.new_full((1,), 777.0)])[batch["response_index"]]
    return [[value for value in row if value != 777] for row in padded.tolist()]


def test_what_is_asked_for() -> None:
    chosen = [[*e["prompt_ids"], *e["chosen_ids"]] for e in EXAMPLES]
    rejected = [[*e["prompt_ids"], *e["rejected_ids"]] for e in EXAMPLES]
    for layout in LAYOUTS:
        batch = PairCollator(0, layout)(EXAMPLES)
        assert by_sequence(batch, batch["targets"]) == [e["chosen_ids"] for e in EXAMPLES] + [
            e["rejected_ids"] for e in EXAMPLES
        ]
        assert batch["response_lengths"].tolist() == [5, 1, 8, 9, 12, 2]
        assert int(batch["num_tokens"]) == sum(map(len, chosen + rejected))
        predicting = batch["input_ids"].flatten()[batch["predictors"]]
        before = [s[p - 1 : -1] for s, p in zip(chosen + rejected, [len(e["prompt_ids"]) for e in EXAMPLES] * 2)]
        assert by_sequence(batch, predicting) == before
        assert next(iter(batch.values())).shape[0] == 6


def test_a_prompt_stands_once_or_twice() -> None:
    packed, shared = (PairCollator(0, layout)(EXAMPLES) for layout in ("packed", "shared"))
    assert packed["input_ids"].shape[1] - shared["input_ids"].shape[1] == 7 + 3 + 20
    assert "shared_keys" not in packed
    keys = shared["shared_keys"]
    seen = shared["input_ids"][0][keys["rows"]]
    assert torch.equal(seen, packed["input_ids"][0])
    assert torch.equal(shared["position_ids"][0][keys["rows"]], packed["position_ids"][0])
    assert torch.equal(shared["cu_seq_lens_k"], packed["cu_seq_lens_q"])
    assert torch.equal(keys["rows"][keys["first"]], torch.arange(shared["input_ids"].shape[1]))
    assert torch.equal(keys["rows"][keys["again"][1]], keys["again"][0])
    for start, end in pairwise(packed["cu_seq_lens_q"].tolist()):
        assert packed["position_ids"][0, start:end].tolist() == list(range(end - start))


def test_cutting() -> None:
    long = [example(6, 5, 9)]
    e = long[0]
    for layout in LAYOUTS:
        start = PairCollator(0, layout, max_length=8)(long)
        assert by_sequence(start, start["targets"]) == [e["chosen_ids"][:2], e["rejected_ids"][:2]]
        end = PairCollator(0, layout, max_length=8, truncation_mode="keep_end")(long)
        assert by_sequence(end, end["targets"]) == [e["chosen_ids"], e["rejected_ids"][2:]]
        assert end["response_lengths"].tolist() == [5, 8]
        assert int(end["num_tokens"]) == 16
        nothing = PairCollator(0, layout, max_length=6)(long)
        assert nothing["targets"].shape == (0,)
        assert nothing["response_index"].shape == (2, 0)


def test_an_overlong_prompt_cut_differently_is_not_shared() -> None:
    batch = PairCollator(0, "shared", max_length=12, truncation_mode="keep_end")([example(10, 3, 6)])
    assert "shared_keys" not in batch
    assert batch["input_ids"].shape == (1, 24)


def test_no_prompt_at_all() -> None:
    batch = PairCollator(0, "shared")([example(0, 3, 4)])
    assert batch["response_lengths"].tolist() == [3, 4]
    assert batch["targets"].shape == (5,)  # nothing predicts a first token


def test_padding_to_a_multiple_and_reference_values() -> None:
    examples = [{**e, "ref_chosen_logps": float(i), "ref_rejected_logps": -1.5} for i, e in enumerate(EXAMPLES)]
    batch = PairCollator(9, pad_to_multiple_of=16)(examples)
    assert batch["input_ids"].shape == (6, 32)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 9).all()
    assert batch["ref_chosen_logps"].tolist() == [0.0, 1.0, 2.0]
    assert batch["ref_rejected_logps"].dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2-window", "gemma3_text", "qwen3-windows", "phi3"])
def test_every_layout_gives_the_same_logprobs_and_gradients(name: str) -> None:
    stock, model = build_tiny_variant(name), build_tiny_variant(name)
    assert accelerate(model, families=EVERY).fast_layers == 2
    batch = PairCollator(0)(EXAMPLES)
    logits = stock(**arguments(batch), use_cache=False).logits.flatten(0, 1)[batch["predictors"]]
    want = logits.log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
    weights = torch.linspace(-1, 1, len(want))
    (want * weights).sum().backward()
    for layout in LAYOUTS:
        batch = PairCollator(0, layout)(EXAMPLES)
        model.zero_grad()
        got = causal_lm_logprobs(model, arguments(batch), batch["predictors"], batch["targets"]).logprobs
        (got * weights).sum().backward()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        for (path, mine), (_, its) in zip(model.named_parameters(), stock.named_parameters()):
            assert mine.grad is not None, path
            assert its.grad is not None, path
            assert (mine.grad - its.grad).norm() <= 1e-5 * its.grad.norm(), (layout, path)


def test_shared_prompts_never_reach_stock_attention() -> None:
    batch = PairCollator(0, "shared")(EXAMPLES)
    asked = (arguments(batch), batch["predictors"], batch["targets"])
    stock = build_tiny_model()
    with pytest.raises(ModelError, match="the model is not accelerated"):
        causal_lm_logprobs(stock, *asked)
    model = build_tiny_model()
    accelerate(model, families=EVERY)
    for name, message in (("output_attentions", "attention maps are asked for"), ("head_mask", "head_mask is not")):
        given = {**asked[0], name: True if name == "output_attentions" else torch.ones(1)}
        with pytest.raises(ModelError, match=message):
            causal_lm_logprobs(model, given, *asked[1:])
    model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="some layers run stock"):
        causal_lm_logprobs(model, *asked)
