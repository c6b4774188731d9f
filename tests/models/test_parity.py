"""Whole models against stock transformers: loss, logits and the gradient of every trained parameter.

The truth is a float64 model whose layers are computed by `spec_block.py`: stock itself rounds norms to float32, also in
a float64 model. Stock in float32 has to agree with that truth, or detector or surgery is wrong; the fused block has to,
or it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pyralis.models.families import FAMILIES as SERVED
from pyralis.models.fused import FusedBlock
from pyralis.models.surgery import accelerate, decoder_layers, report, restore
from pyralis.train.loss import supervised_loss_sum
from tests.models.spec_block import SpecBlock, block_in_place
from tests.tiny import FAMILIES, VARIANTS, build_tiny_variant

EVERY = tuple(family.name for family in SERVED)
NAMES = [name for name in (*FAMILIES, *VARIANTS) if name not in ("gpt2", "bloom")]
LAYOUTS = ("full", "right", "left", "packed")
MODES = ("lora", "lora-some", "full")
LOSS_ERROR, GRADIENT_ERROR, LOGIT_ERROR = 1e-6, 1e-5, 1e-5  # relative; of gradients and logits, of their norm


class Outcome(NamedTuple):
    loss: Tensor
    logits: Tensor  # of real tokens
    gradients: dict[str, Tensor]


def batch(layout: str) -> dict[str, Any]:
    """Two rows of 24 tokens and their labels; the one predicted from the last pad row is left out: it is undefined."""
    ids = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(5))
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :3] = -100
    if layout == "packed":
        positions = torch.stack([torch.cat([torch.arange(9), torch.arange(15)]), torch.arange(24)])
        labels[0, 9] = -100
        return {"input_ids": ids, "position_ids": positions, "labels": labels}
    if layout == "right":
        mask[1, 17:] = 0
    if layout == "left":
        mask[1, :7] = 0
        labels[1, 7] = -100
    labels[mask == 0] = -100
    inputs = {"input_ids": ids, "labels": labels}
    return inputs if layout == "full" else {**inputs, "attention_mask": mask}


def build(name: str, mode: str) -> Any:
    model = build_tiny_variant(name).train()
    if mode == "full":
        return model
    linears = [name for name, module in model.model.layers[0].named_modules() if isinstance(module, nn.Linear)]
    names = sorted({name.rpartition(".")[2] for name in linears})
    if mode == "lora-some":
        names = [name for name in names if name not in ("k_proj", "up_proj", "o_proj")]
    ranks = {names[0]: 3}
    config = LoraConfig(target_modules=names, r=8, rank_pattern=ranks, lora_alpha=12)
    torch.manual_seed(2)
    tuned = get_peft_model(model, config)
    for key, parameter in tuned.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.05)
    return tuned.train()


def outcome(model: Any, layout: str) -> Outcome:
    inputs = batch(layout)
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits
    loss = supervised_loss_sum(logits, labels)[0] if logits.dtype != torch.float64 else exact_loss(logits, labels)
    loss = loss / (labels[:, 1:] != -100).sum()
    model.zero_grad(set_to_none=True)
    loss.backward()
    real = inputs.get("attention_mask", torch.ones_like(labels)).bool()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Outcome(loss.detach(), logits.detach()[real], gradients)


def exact_loss(logits: Tensor, labels: Tensor) -> Tensor:
    kept = labels[:, 1:] != -100
    return nn.functional.cross_entropy(logits[:, :-1][kept], labels[:, 1:][kept], reduction="sum")


def truth(model: Any, layout: str) -> Outcome:
    exact = copy.deepcopy(model).double()
    with block_in_place(SpecBlock()) as block:
        accelerate(exact, families=EVERY)
        found = outcome(exact, layout)
        assert block.calls == len(decoder_layers(exact))
    return found


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def check(got: Outcome, want: Outcome, factor: float = 1.0) -> None:
    """`factor`: how much larger errors may be than the limits."""
    assert error(got.loss, want.loss) < LOSS_ERROR * factor
    assert error(got.logits, want.logits) < LOGIT_ERROR * factor
    assert got.gradients.keys() == want.gradients.keys()
    errors = {name: error(got.gradients[name], value) for name, value in want.gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < GRADIENT_ERROR * factor, f"{worst}: {errors[worst]:.1e}"


def pairwise() -> Iterator[Any]:
    """Every name with every layout and every mode, but not every three of them; all of them are marked full."""
    for index, (name, (offset, layout)) in enumerate(product(NAMES, enumerate(LAYOUTS))):
        for position, mode in enumerate(MODES):
            chosen = (index // len(LAYOUTS) + offset) % len(MODES) == position
            quick = chosen and (name in FAMILIES or layout in ("left", "packed"))
            yield pytest.param(name, layout, mode, marks=() if quick else pytest.mark.full)


@pytest.mark.parametrize(("name", "layout", "mode"), pairwise())
def test_parity(name: str, layout: str, mode: str) -> None:
    model = build(name, mode)
    want = truth(model, layout)
    check(outcome(model, layout), want)
    with block_in_place(FusedBlock()):
        accelerate(model, families=EVERY)
        got = outcome(model, layout)
        assert report(model).fast_layers == 2, report(model).lines
        check(got, want)
        restore(model)
