"""Fast models to compare with stock ones; tests take the block that runs them by the fixture `block`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyralis.models import unpadding
from pyralis.models.families import FAMILIES as SERVED
from pyralis.models.surgery import accelerate, decoder_layers, report
from tests.models.spec_block import CountedFused, SpecBlock

Block = SpecBlock | CountedFused

EVERY = tuple(family.name for family in SERVED)
IDS = torch.arange(4, 52).view(2, 24)
# Tolerance of "equal to stock" in float32: sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def fast(model: Any) -> Any:
    assert accelerate(model, families=EVERY).fast_layers == len(decoder_layers(model))
    return model


@contextmanager
def padding_computed() -> Iterator[None]:
    """Padded rows as they are."""
    with patch.object(unpadding, "pays", lambda layout: False):
        yield


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    return model(IDS, **{"use_cache": False, **inputs}).logits


def reasons(model: nn.Module) -> list[str]:
    return [layer.reason for layer in report(model).layers]


def give_lora(model: PreTrainedModel, **config: Any) -> Any:
    """LoRA whose B is not zero, else it would go unseen; the same for every model."""
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4, **config))
    fill_lora(tuned)
    return tuned


def fill_lora(model: nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)


def step(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    loss = logits(model).square().mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_step(model: nn.Module, expected: nn.Module) -> None:
    (loss, gradients), (expected_loss, expected_gradients) = step(model), step(expected)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-6, msg=name)
