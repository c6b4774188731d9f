"""Starts of LoRA that are taken from data: PEFT finds the same ones in a fast model as in a stock one, and training
them is fast.

They watch a model by hooks, for which it runs stock, or by the gradients of its weights.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from pyralis.models.surgery import accelerate, report
from tests.models.test_lora_options import ALL, EVERY, IDS, logits, move, same, step
from tests.tiny import build_tiny_model

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 12, "target_modules": ALL}


def with_eva(model: Any) -> Any:
    tuned = get_peft_model(model, LoraConfig(**LORA, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)))
    batches = [{"input_ids": IDS.roll(shift, 1), "attention_mask": torch.ones_like(IDS)} for shift in range(4)]
    initialize_lora_eva_weights(tuned, dataloader=batches, show_progress_bar=False)
    return tuned


def with_corda(model: Any) -> Any:
    pytest.importorskip("attr", reason="PEFT's CorDA takes it")
    from peft.tuners.lora.corda import preprocess_corda

    config = LoraConfig(**LORA, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    preprocess_corda(model, config, run_model=lambda: logits(model))
    return get_peft_model(model, config)


def with_lora_ga(model: Any) -> Any:
    config = LoraConfig(**LORA, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(model, config, lambda: logits(model).square().mean().backward())
    return get_peft_model(model, config)


@contextmanager
def expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("start", [with_eva, with_corda, with_lora_ga])
def test_a_start_from_data(start: Callable[[Any], Any]) -> None:
    models = []
    for is_fast in (True, False):
        model: Any = build_tiny_model("llama", attention_bias=True)
        if is_fast:
            assert accelerate(model, families=EVERY).fast_layers == 2
        torch.manual_seed(0)
        with expected_warnings():
            models.append(start(model))
    fast, stock = models
    first: dict[str, nn.Parameter] = dict(fast.named_parameters())
    assert first.keys() == dict(stock.named_parameters()).keys()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(first[name], parameter, rtol=1e-3, atol=1e-4, msg=name)
    fast.load_state_dict(copy.deepcopy(stock.state_dict()))  # singular vectors are known up to rounding
    for model in (fast, stock):
        move(model, 1)
    same(step(fast), step(stock))
    assert [layer.reason for layer in report(fast).layers] == ["", ""]
    ranks = {m.r["default"] for m in fast.modules() if hasattr(m, "lora_A")}
    assert (len(ranks) > 1) == (start is with_eva)  # which gives ranks to where they explain most
