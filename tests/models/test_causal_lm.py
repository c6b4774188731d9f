"""The loss without stored logits is the loss of the stored ones, with every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from pyralis.models import causal_lm
from pyralis.models.causal_lm import causal_lm_loss, head_reason
from pyralis.models.families import FAMILIES as SERVED
from pyralis.models.surgery import accelerate, restore
from pyralis.train.loss import supervised_loss_sum
from tests.models.spec_block import SpecBlock, block_in_place
from tests.tiny import VOCAB_SIZE, build_tiny_model

EVERY = tuple(family.name for family in SERVED)
IDS = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 17:] = 0
LABELS = IDS.masked_fill(MASK == 0, -100)
LABELS[:, :6] = -100
INPUTS = {"input_ids": IDS, "attention_mask": MASK}
SUPERVISED = int((LABELS[:, 1:] != -100).sum())


@pytest.fixture(autouse=True)
def block() -> Iterator[None]:
    with block_in_place(SpecBlock()):
        yield


@pytest.fixture
def logits_stored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the logits that a loss was made from."""
    seen: list[int] = []
    stored = causal_lm.cross_entropy

    def noted(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(logits.numel())
        return stored(logits, *args, **kwargs)

    monkeypatch.setattr(causal_lm, "cross_entropy", noted)
    return seen


def fast(model: Any) -> Any:
    assert accelerate(model, families=EVERY).fast_layers == 2
    return model


def results(model: nn.Module, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected(
    model: nn.Module, *, smoothing: float = 0.0, items: float = SUPERVISED
) -> tuple[Tensor, dict[str, Tensor]]:
    loss, _ = supervised_loss_sum(model(**INPUTS, use_cache=False).logits, LABELS, label_smoothing=smoothing)
    return results(model, loss / items)


def check(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert (got[1][name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gemma3_text", "granite", "phi3"])
def test_softcaps_and_scales(family: str, logits_stored: list[int]) -> None:
    config = {"final_logit_softcapping": 2.0} if family in ("gemma2", "gemma3_text") else {}
    model, stock = fast(build_tiny_model(family, **config)), build_tiny_model(family, **config)
    check(results(model, causal_lm_loss(model, INPUTS, LABELS)), expected(stock))
    assert not logits_stored
    assert head_reason(model) is None


def test_items_smoothing_and_rows(logits_stored: list[int]) -> None:
    model, stock = fast(build_tiny_model()), build_tiny_model()
    for items in (7.0, torch.tensor(7)):
        check(results(model, causal_lm_loss(model, INPUTS, LABELS, items)), expected(stock, items=7))
    got = results(model, causal_lm_loss(model, INPUTS, LABELS, label_smoothing=0.1, supervised_rows=SUPERVISED))
    check(got, expected(stock, smoothing=0.1))
    with torch.no_grad():
        assert causal_lm_loss(model, INPUTS, torch.full_like(LABELS, -100)) == 0
    assert not logits_stored


def test_the_same_loss_without_a_fast_model(logits_stored: list[int]) -> None:
    model = build_tiny_model()
    check(results(model, causal_lm_loss(model, {**INPUTS, "padding_side": "right"}, LABELS)), expected(model))
    check(
        results(model, causal_lm_loss(model, INPUTS, LABELS, 7.0, label_smoothing=0.1)),
        expected(model, smoothing=0.1, items=7),
    )
    assert logits_stored == [IDS.numel() * VOCAB_SIZE] * 2
    assert str(head_reason(model)) == "the model is not accelerated"
    restore(fast(model))
    assert str(head_reason(model)) == "the model is not accelerated"


def test_under_peft(logits_stored: list[int]) -> None:
    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(fast(build_tiny_model()), config)
    torch.manual_seed(0)
    check(results(model, causal_lm_loss(model, INPUTS, LABELS)), expected(get_peft_model(build_tiny_model(), config)))
    assert not logits_stored


def test_a_head_that_is_trained(logits_stored: list[int]) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(fast(build_tiny_model()), config)
    torch.manual_seed(0)
    stock = get_peft_model(build_tiny_model(), config)
    for m in (model, stock):
        with torch.no_grad():
            m.get_output_embeddings().modules_to_save["default"].weight.mul_(1.1)
    want = expected(stock)
    assert any("lm_head" in name for name in want[1])
    check(results(model, causal_lm_loss(model, INPUTS, LABELS)), want)
    with model.disable_adapter(), stock.disable_adapter(), torch.no_grad():
        loss = causal_lm_loss(model, INPUTS, LABELS)
        without = supervised_loss_sum(stock(**INPUTS).logits, LABELS)[0] / SUPERVISED
    torch.testing.assert_close(loss, without, rtol=1e-6, atol=0)
    assert not torch.allclose(loss, want[0], rtol=1e-3)
    assert not logits_stored


def test_lora_on_the_head(logits_stored: list[int]) -> None:
    config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(fast(build_tiny_model()), config)
    torch.manual_seed(0)
    check(results(model, causal_lm_loss(model, INPUTS, LABELS)), expected(get_peft_model(build_tiny_model(), config)))
    assert len(logits_stored) == 1
    assert str(head_reason(model)) == "lm_head is peft.tuners.lora.layer.Linear, not Linear"


def test_hooks_on_the_head(logits_stored: list[int]) -> None:
    model, seen = fast(build_tiny_model()), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    causal_lm_loss(model, INPUTS, LABELS)
    assert (len(seen), len(logits_stored)) == (1, 1)
    assert "hooks" in str(head_reason(model))


def test_prompt_tuning_keeps_its_own_way() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=64)
    model = get_peft_model(fast(build_tiny_model()), config)
    assert str(head_reason(model)) == "the model is not accelerated"


def test_calls_without_a_request_are_stock(logits_stored: list[int]) -> None:
    model, stock = fast(build_tiny_model()), build_tiny_model()
    got = model(**INPUTS, labels=LABELS, use_cache=False)
    want = stock(**INPUTS, labels=LABELS, use_cache=False)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.logits[MASK.bool()], want.logits[MASK.bool()], rtol=1e-4, atol=2e-5)


def test_under_autocast(logits_stored: list[int]) -> None:
    model, stock = build_tiny_model().bfloat16(), build_tiny_model().bfloat16()
    for m in (model, stock):
        m.lm_head.float()  # a head that is trained
    fast(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = causal_lm_loss(model, INPUTS, LABELS)
        want = supervised_loss_sum(stock(**INPUTS, use_cache=False).logits, LABELS)[0] / SUPERVISED
    loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=2e-3, atol=0)
    assert not logits_stored
