"""Whole models against stock transformers: loss, logits and the gradient of every trained parameter.

The truth is a float64 model whose layers are computed by `spec_block.py`: stock itself rounds norms to float32, also in
a float64 model. Stock in float32 has to agree with that truth, or detector or surgery is wrong; the fused block has to,
or it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pyralis.lora.attach import find_linear_targets
from pyralis.models.families import FAMILIES as SERVED
from pyralis.models.fused import FusedBlock
from pyralis.models.load import ModelSettings, load_model
from pyralis.models.nf4 import dequantize_model
from pyralis.models.spec import LayerSpec
from pyralis.models.surgery import accelerate, decoder_layers, report
from pyralis.train.loss import supervised_loss_sum
from tests.models.spec_block import SpecBlock, block_in_place
from tests.tiny import FAMILIES, VARIANTS, build_tiny_variant, make_tiny_model

EVERY = tuple(family.name for family in SERVED)
NAMES = [name for name in (*FAMILIES, *VARIANTS) if name not in ("gpt2", "bloom")]
LAYOUTS = ("full", "right", "left", "packed")
MODES = ("lora", "lora-some", "qlora", "full", "dora", "qdora")
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


def build(name: str, mode: str, folder: Path, *, exact: bool = False) -> Any:
    """A tiny model to train; exact: in float64, 4-bit weights as the numbers they stand for."""
    if mode in ("qlora", "qdora"):
        family, fields = VARIANTS.get(name, (name, {}))
        if not (folder / "config.json").exists():
            make_tiny_model(folder, family, **fields)
        model: Any = load_model(ModelSettings(str(folder), train_mode="qlora", dtype="float32")).model
        if exact:
            dequantize_model(model, torch.float32)
    else:
        model = build_tiny_variant(name)
    model = model.double().train() if exact else model.train()
    return model if mode == "full" else with_lora(model, some=mode == "lora-some", dora=mode.endswith("dora"))


def with_lora(model: Any, *, some: bool, dora: bool = False) -> Any:
    """The same adapter for the same model, nothing at its start: on all linear layers, in two ranks, or on some."""
    names = sorted({target.rpartition(".")[2] for target in find_linear_targets(model)})
    if some:
        names = [name for name in names if name not in ("k_proj", "up_proj", "o_proj")]
    model.requires_grad_(False)
    options: dict[str, Any] = {"r": 8, "rank_pattern": {names[0]: 3}, "lora_alpha": 12, "use_dora": dora}
    tuned = get_peft_model(model, LoraConfig(target_modules=names, **options))
    generator = torch.Generator().manual_seed(2)
    for key, parameter in tuned.named_parameters():
        if "lora_magnitude_vector" in key:
            parameter.data *= (0.7 + 0.6 * torch.rand(parameter.shape, generator=generator)).to(parameter.dtype)
        elif "lora_" in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
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


def truth(exact: Any, layout: str) -> Outcome:
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
def test_parity(name: str, layout: str, mode: str, tmp_path: Path) -> None:
    model = build(name, mode, tmp_path)
    want = truth(build(name, mode, tmp_path, exact=True), layout)
    check(outcome(model, layout), want)
    with block_in_place(FusedBlock()):
        accelerate(model, families=EVERY)
        got = outcome(model, layout)
        assert report(model).fast_layers == 2, report(model).lines
        check(got, want)


class OffByOnePercent(FusedBlock):
    """Something of the layers' spec, or a gradient, 1 % wrong."""

    def __init__(self, part: str) -> None:
        self.part = part

    def prepare(self, layers: Any, kept: Any) -> Any:
        return super().prepare([(layer, self.changed(spec)) for layer, spec in layers], kept)

    def changed(self, spec: LayerSpec) -> LayerSpec:
        attention = spec.attention
        match self.part:
            case "scale":
                return replace(spec, attention=replace(attention, scale=attention.scale * 1.01))
            case "softcap":
                assert attention.softcap is not None
                return replace(spec, attention=replace(attention, softcap=attention.softcap * 1.01))
            case "window":
                return replace(spec, attention=replace(attention, window=attention.window and attention.window + 1))
            case "residual_multiplier":
                return replace(spec, residual_multiplier=spec.residual_multiplier * 1.01)
            case "eps":
                return replace(spec, input_norm=replace(spec.input_norm, eps=spec.input_norm.eps * 100))
        return spec

    def run(self, handle: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = super().run(handle, hidden_states, *args, **kwargs)
        return out if self.part != "gradient" else 1.01 * out - 0.01 * out.detach()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("llama", "gradient"), ("llama", "scale"), ("llama", "eps"), ("granite", "residual_multiplier"),
        ("gemma2-window", "softcap"), ("gemma2-window", "window"),
    ],
)  # fmt: skip
def test_what_is_a_little_wrong_fails(name: str, part: str, tmp_path: Path) -> None:
    want = truth(build(name, "lora", tmp_path, exact=True), "full")
    model = build(name, "lora", tmp_path)
    with block_in_place(OffByOnePercent(part)):
        accelerate(model, families=EVERY)
        got = outcome(model, "full")
    with pytest.raises(AssertionError):
        check(got, want)
