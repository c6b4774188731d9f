"""A model's policy: chosen once, followed where checkpointing is on, and without a say in the gradients."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from pyralis.models.checkpointing import choose_save_policy
from pyralis.models.policy import POLICIES, SavePolicy
from pyralis.models.surgery import decoder_layers, report, restore
from tests.models.fast_models import fast, fill_lora, give_lora, logits
from tests.models.spec_block import CountedFused, block_in_place
from tests.tiny import build_tiny_model


def training_model(family: str, lora: bool, policy: SavePolicy | None) -> Any:
    model = fast(build_tiny_model(family))
    model = give_lora(model, lora_dropout=0.1) if lora else model
    fill_lora(model)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    choose_save_policy(decoder_layers(model), policy)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)  # of dropout's masks
    logits(model).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_every_policy_is_followed_and_gives_the_same_gradients(family: str, lora: bool) -> None:
    expected: dict[str, Tensor] = {}
    for policy in POLICIES:
        with block_in_place(CountedFused()) as block:
            found = gradients(model := training_model(family, lora, policy))
        assert block.policy == policy
        assert report(model).fast_layers == 2
        expected = expected or found
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert torch.equal(gradient, expected[name]), (policy, name)


def test_the_switch_says_whether_and_the_policy_how() -> None:
    with block_in_place(CountedFused()) as block:
        model = training_model("llama", False, "offload_input")
        logits(model.eval())
        assert block.policy == "keep"
        logits(model.train())
        assert block.policy == "offload_input"
        model.gradient_checkpointing_disable()
        logits(model)
        assert block.policy == "keep"
        model.gradient_checkpointing_enable({"use_reentrant": False})
        choose_save_policy(decoder_layers(model), None)
        logits(model)
        assert block.policy == "recompute_layer"


def test_a_choice_is_copied_and_pickled_and_not_in_the_weights() -> None:
    model = fast(build_tiny_model()).train()
    choose_save_policy(decoder_layers(model), "offload_input")
    names = set(build_tiny_model().state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.gradient_checkpointing_enable({"use_reentrant": False})
        with block_in_place(CountedFused()) as block:
            logits(twin)
        assert block.policy == "offload_input"
        assert set(twin.state_dict()) == names


def test_a_restored_model_checkpoints_as_transformers_does() -> None:
    model, stock = training_model("llama", False, "offload_input"), training_model("llama", False, None)
    restore(model)
    restore(stock)
    for (name, a), b in zip(gradients(model).items(), gradients(stock).values()):
        assert torch.equal(a, b), name


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of keep, recompute_cheap, recompute_layer, offload_input"):
        choose_save_policy([], "offload")  # type: ignore[arg-type]
