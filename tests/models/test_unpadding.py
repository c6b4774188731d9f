"""Padded batches computed without their padding: equal to stock and to the same model computing it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pyralis.models import unpadding
from pyralis.models.causal_lm import causal_lm_loss
from pyralis.models.logprobs import causal_lm_logprobs
from pyralis.models.surgery import accelerate, decoder_layers, report
from pyralis.train.loss import supervised_loss_sum
from tests.models.fast_models import fast, give_lora, padding_computed
from tests.models.spec_block import CountedFused, block_in_place
from tests.models.test_parity import EVERY, NAMES, build, error
from tests.tiny import build_tiny_model, build_tiny_variant

SEQ, LENGTHS = 24, (24, 9, 1, 17)
REAL = sum(LENGTHS)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


class Seen(CountedFused):
    """Notes the shapes that the layers are given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def run(self, handle: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.shapes.add(tuple(hidden_states.shape[:2]))
        return super().run(handle, hidden_states, *args, **kwargs)

    def take(self) -> set[tuple[int, ...]]:
        found, self.shapes = self.shapes, set()
        return found


@pytest.fixture
def seen() -> Iterator[Seen]:
    with block_in_place(Seen()) as block:
        yield block


def batch(side: str = "right") -> tuple[dict[str, Tensor], Tensor]:
    """Four rows and their labels; what the last pad token on the left would have to predict is left out."""
    ids = torch.randint(4, 300, (len(LENGTHS), SEQ), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(SEQ) < torch.tensor(LENGTHS)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    if side == "left":
        mask, labels = mask.flip(1), labels.flip(1)
        for row, length in enumerate(LENGTHS):
            labels[row, SEQ - length] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


def results(model: nn.Module, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert error(got[0], want[0]) < 2e-6
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert error(got[1][name], gradient) < 2e-5, name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_every_family(name: str, side: str, seen: Seen, tmp_path: Path) -> None:
    """Loss, logits and gradients; softcaps too, which a CPU computes with all scores and so would not unpad."""
    inputs, labels = batch(side)
    real = inputs["attention_mask"].bool()
    model = build(name, "qlora" if side == "left" else "lora", tmp_path)
    logits = model(**inputs, use_cache=False).logits
    stock = results(model, supervised_loss_sum(logits, labels)[0] / (labels[:, 1:] != -100).sum())
    accelerate(model, families=EVERY)
    with patch.object(unpadding, "VARIABLE_LENGTHS", (*unpadding.VARIABLE_LENGTHS, "math")):
        got = results(model, causal_lm_loss(model, inputs, labels))
        found = model(**inputs, use_cache=False).logits
    assert seen.take() == {(1, REAL)}
    assert report(model).fast_layers == len(decoder_layers(model))
    same(got, stock)
    assert error(found[real], logits[real]) < 1e-5
    with padding_computed():
        same(got, results(model, causal_lm_loss(model, inputs, labels)))
    assert seen.take() == {(len(LENGTHS), SEQ)}


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_options_of_the_loss(mode: str, seen: Seen, tmp_path: Path) -> None:
    model, (inputs, labels) = build("llama", mode, tmp_path), batch()
    accelerate(model, families=EVERY)
    settings: dict[str, Any] = {"num_items": torch.tensor(31.0), "label_smoothing": 0.1, "supervised_rows": 44}
    got = results(model, causal_lm_loss(model, inputs, labels, **settings))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    again = results(model, causal_lm_loss(model, inputs, labels, **settings))
    assert seen.take() == {(1, REAL)}
    assert all(torch.equal(again[1][name], value) for name, value in got[1].items())
    with padding_computed():
        same(got, results(model, causal_lm_loss(model, inputs, labels, **settings)))


def test_what_a_last_token_predicts_may_stand_in_the_padding(seen: Seen) -> None:
    model, stock = fast(build_tiny_model()), build_tiny_model()
    inputs, labels = batch()
    for row, length in enumerate(LENGTHS[1:], 1):
        labels[row, length] = 2  # a stop token that no input follows
    want = supervised_loss_sum(stock(**inputs).logits, labels)[0] / (labels[:, 1:] != -100).sum()
    same(results(model, causal_lm_loss(model, inputs, labels)), results(stock, want))
    assert seen.take() == {(1, REAL)}


@pytest.mark.parametrize("return_dict", [True, False])
def test_hidden_states_come_back_padded(return_dict: bool, seen: Seen) -> None:
    stock, model = build_tiny_model("qwen3"), fast(build_tiny_model("qwen3"))
    inputs = batch("left")[0]
    real = inputs["attention_mask"].bool()
    options: dict[str, Any] = {"use_cache": False, "output_hidden_states": True, "return_dict": return_dict}
    expected, found = stock.model(**inputs, **options), model.model(**inputs, **options)
    assert seen.take() == {(1, REAL)}
    assert type(found) is type(expected)
    last, states = (found.last_hidden_state, found.hidden_states) if return_dict else found
    stock_last, stock_states = (expected.last_hidden_state, expected.hidden_states) if return_dict else expected
    assert len(states) == len(stock_states) == 3
    for a, b in zip((last, *states), (stock_last, *stock_states)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        torch.testing.assert_close(a[real], b[real], **CLOSE)
        assert not a[~real].any()


@pytest.mark.parametrize("shared", [True, False])
def test_positions_and_embeddings_that_are_given(shared: bool, seen: Seen) -> None:
    model, stock = fast(build_tiny_model()), build_tiny_model()
    inputs = batch("left")[0]
    mask = inputs["attention_mask"]
    positions = 3 + 2 * torch.arange(SEQ)[None] if shared else (mask.cumsum(1) - 1).clamp(min=0)
    gradients = []
    for m in (model, stock):
        embeddings = m.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        out = m(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False).logits
        out[mask.bool()].square().mean().backward()
        gradients.append(embeddings.grad)
    assert seen.take() == {(1, REAL)}
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("name", ["llama-dynamic-rope", "phi3-longrope"])
def test_angles_are_those_of_the_padded_call(name: str, seen: Seen) -> None:
    """They change with the longest position; here that one is padding."""
    model, stock = fast(build_tiny_variant(name)), build_tiny_variant(name)
    ids = torch.randint(4, 300, (2, 150), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(150) < torch.tensor([[14], [9]])).long()
    found, expected = (m(ids, attention_mask=mask, use_cache=False).logits[mask.bool()] for m in (model, stock))
    assert seen.take() == {(1, 23)}
    torch.testing.assert_close(found, expected, **CLOSE)
    alone = stock(ids[:1, :14], use_cache=False).logits[0]
    assert not torch.allclose(expected[:14], alone, **CLOSE)


def test_logprobs(seen: Seen) -> None:
    model, stock = fast(build_tiny_model("gemma")), build_tiny_model("gemma")
    inputs = batch()[0]
    rows, targets = torch.tensor([3, 27, 3, 0, 75, 48]), torch.tensor([5, 11, 300, 42, 17, 8])
    want = stock(**inputs).logits.flatten(0, 1)[rows].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    got = causal_lm_logprobs(model, inputs, rows, targets).logprobs
    assert seen.take() == {(1, REAL)}
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (got.sum() + want.sum()).backward()
    for (name, mine), its in zip(model.named_parameters(), stock.parameters()):
        assert error(mine.grad, its.grad) < 2e-5, name


def test_lengths_that_are_said(seen: Seen) -> None:
    model = fast(build_tiny_model())
    inputs, labels = batch()
    want = causal_lm_loss(model, inputs, labels)
    unseen = torch.empty(len(LENGTHS), SEQ, device="meta")  # reading it raises
    said: dict[str, Any] = {"attention_mask": unseen, "padding_side": "right"}
    for lengths in (LENGTHS, list(LENGTHS), torch.tensor(LENGTHS)):
        assert torch.equal(causal_lm_loss(model, {**inputs, **said, "sequence_lengths": lengths}, labels), want)
    assert seen.take() == {(1, REAL)}
    causal_lm_loss(model, {**inputs, **said}, labels)
    assert seen.take() == {(len(LENGTHS), SEQ)}
    for wrong in ((24, 9, 1), (25, 9, 1, 17)):
        with pytest.raises(ValueError, match="number of real tokens of each of 4 rows of 24"):
            causal_lm_loss(model, {**inputs, **said, "sequence_lengths": wrong}, labels)
    stock = build_tiny_model()
    torch.testing.assert_close(causal_lm_loss(stock, {**inputs, "sequence_lengths": LENGTHS}, labels), want)


def test_dropout_is_that_of_the_packed_batch() -> None:
    model: Any = fast(give_lora(build_tiny_model(), lora_dropout=0.4)).train()
    inputs, labels = batch()
    real = inputs["attention_mask"].bool()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    packed = {"input_ids": inputs["input_ids"][real][None], "position_ids": positions}
    losses = []
    for given, wanted in ((inputs, labels), (packed, labels[real][None])):
        torch.manual_seed(11)
        losses.append(results(model, causal_lm_loss(model, given, wanted)))
    assert torch.equal(losses[0][0], losses[1][0])
    assert all(torch.equal(losses[0][1][name], value) for name, value in losses[1][1].items())
    assert not torch.equal(losses[0][0], causal_lm_loss(model, inputs, labels))


class TestWherePaddingIsComputed:
    """Each of them equal to stock as well."""

    @pytest.fixture(autouse=True)
    def a_model(self, seen: Seen) -> None:
        self.seen, self.model, self.inputs = seen, fast(build_tiny_model()), batch()[0]

    def check(self) -> None:
        real = self.inputs["attention_mask"].bool()
        want = build_tiny_model()(**self.inputs, use_cache=False).logits
        found = self.model(**self.inputs, use_cache=False).logits
        torch.testing.assert_close(found[real], want[real], **CLOSE)
        assert self.seen.take() == {(len(LENGTHS), SEQ)}

    def test_hooks_that_could_tell(self) -> None:
        self.model.model.embed_tokens.register_forward_hook(lambda module, args, output: output)
        self.check()

    def test_hooks_inside_trained_embeddings(self) -> None:
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
        self.model = get_peft_model(self.model, config)
        wrapper = self.model.get_input_embeddings()
        self.model(**self.inputs, use_cache=False)
        assert self.seen.take() == {(1, REAL)}
        wrapper.modules_to_save["default"].register_forward_hook(lambda module, args, output: output)
        self.check()

    def test_hooks_of_a_layer(self) -> None:
        self.model.model.layers[1].register_forward_hook(lambda *_: None)
        self.check()

    def test_a_layer_that_runs_stock(self) -> None:
        self.model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        self.check()

    def test_modules_that_accelerate_has_placed(self) -> None:
        self.model.model.norm._hf_hook = object()
        self.check()

    def test_attention_that_would_hold_all_scores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(unpadding, "VARIABLE_LENGTHS", ())
        self.check()

    def test_rows_that_are_full(self) -> None:
        self.inputs["attention_mask"] = torch.ones_like(self.inputs["attention_mask"])
        self.check()
