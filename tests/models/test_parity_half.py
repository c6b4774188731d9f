"""Whole models in half precision on the CPU, as training runs them: errors to float64 at most 1.5 times stock's.

LoRA and DoRA have a half-precision base and float32 adapters, QLoRA and QDoRA an NF4 base, full training float32
masters, all of them under autocast; float16 losses are scaled. The truth is that of `pyralis.verify.exact`, held by
`tests/verify/test_exact.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from pyralis.models.families import FAMILIES as SERVED
from pyralis.models.load import ModelSettings, load_model
from pyralis.models.surgery import accelerate, report
from pyralis.verify.batches import LAYOUTS, Example, make_batches
from pyralis.verify.measure import Outcome, measure_fast, measure_stock, measure_truth
from tests.models.test_parity import EVERY, NAMES, error, with_lora
from tests.tiny import FAMILIES, VARIANTS, build_tiny_variant, make_tiny_model

MODES = ("lora", "qlora", "full")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
IDS = torch.randint(4, 300, (5, 24), generator=torch.Generator().manual_seed(5)).tolist()
BATCHES = make_batches([Example(ids, [-100] * 3 + ids[3:]) for ids in IDS], 2, 24, torch.device("cpu"))


def cases() -> Iterator[Any]:
    """Every name, dtype and mode, each in one layout; among the names every mode meets every layout."""
    for (place, name), (shift, mode), dtype in product(enumerate(NAMES), enumerate(MODES), DTYPES):
        layout = LAYOUTS[(place + shift + (dtype == "fp16")) % len(LAYOUTS)]
        quick = name in FAMILIES and dtype == "bf16"
        yield pytest.param(name, layout, dtype, mode, marks=() if quick else pytest.mark.full)


def build(name: str, mode: str, dtype: torch.dtype, folder: Path, *, seed: int = 0) -> Any:
    if mode == "full":
        return build_tiny_variant(name, seed=seed).train()
    dora = mode.endswith("dora")
    if mode in ("lora", "dora"):
        return with_lora(build_tiny_variant(name, seed=seed).to(dtype), some=False, dora=dora)
    family, fields = VARIANTS.get(name, (name, {}))
    settings = ModelSettings(str(make_tiny_model(folder, family, seed=seed, **fields)), train_mode="qlora")
    return with_lora(load_model(settings, device=torch.device("cpu"), dtype=dtype).model, some=False, dora=dora)


def errors(got: Outcome, want: Outcome) -> tuple[float, float]:
    """Of the tokens' losses, and of all gradients together."""
    assert got.gradients.keys() == want.gradients.keys()
    flat = [torch.cat([o.gradients[name].double().flatten() for name in want.gradients]) for o in (got, want)]
    return error(got.token_losses, want.token_losses), error(*flat)


@pytest.mark.parametrize(("name", "layout", "dtype", "mode"), cases())
def test_half_precision(name: str, layout: str, dtype: str, mode: str, tmp_path: Path) -> None:
    model, inputs = build(name, mode, DTYPES[dtype], tmp_path), BATCHES[LAYOUTS.index(layout)]  # type: ignore[arg-type]
    truth, stock = measure_truth(model, inputs), measure_stock(model, inputs, DTYPES[dtype])
    accelerate(model, families=EVERY)
    fast = measure_fast(model, inputs, DTYPES[dtype])
    assert report(model).fast_layers == 2, report(model).lines
    got, allowed = errors(fast, truth), errors(stock, truth)
    assert all(a <= 1.5 * b for a, b in zip(got, allowed)), (got, allowed)


@pytest.mark.parametrize("mode", ["dora", "qdora"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.full) for n in NAMES])
def test_dora(name: str, dtype: str, mode: str, tmp_path: Path) -> None:
    """Over all layouts together, each with a model of its own: stock's error in one of them may be small by chance."""
    squares = torch.zeros(2, 2)  # ours and stock's; of losses and of gradients
    for seed, inputs in enumerate((*BATCHES, *BATCHES[:1])):
        model = build(name, mode, DTYPES[dtype], tmp_path / str(seed), seed=seed)
        truth, stock = measure_truth(model, inputs), measure_stock(model, inputs, DTYPES[dtype])
        accelerate(model, families=EVERY)
        fast = measure_fast(model, inputs, DTYPES[dtype])
        assert report(model).fast_layers == 2, report(model).lines
        squares += torch.tensor([errors(found, truth) for found in (fast, stock)]).square()
    assert (squares[0] <= 1.5**2 * squares[1]).all(), squares.sqrt()


@pytest.mark.parametrize("name", ["gemma", "qwen2"])
def test_a_residual_stream_beyond_float16(name: str) -> None:
    """Gemma's and Qwen's leave float16's range. Over float32 embeddings they are float32, in stock and here."""
    model = build_tiny_variant(name)
    weight = model.get_input_embeddings().weight.detach() * 3e6
    model.half().get_input_embeddings().weight = torch.nn.Parameter(weight)
    model.lm_head = torch.nn.Linear(*reversed(weight.shape), bias=False).half()
    model, inputs = with_lora(model, some=False), BATCHES[0]
    truth, stock = measure_truth(model, inputs), measure_stock(model, inputs, torch.float16)
    accelerate(model, families=EVERY)
    fast = measure_fast(model, inputs, torch.float16)
    assert report(model).fast_layers == 2, report(model).lines
    got, allowed = errors(fast, truth), errors(stock, truth)
    assert all(a <= 1.5 * b for a, b in zip(got, allowed)), (got, allowed)


def outgrowing(name: str) -> Any:
    """A float16 model whose embeddings and branches float16 holds, but not their sum."""
    model = build_tiny_variant(name)
    embeddings, peak = model.get_input_embeddings().weight.detach(), 6e4 / (8 if name.startswith("gemma") else 1)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(embeddings.clone())
        model.get_input_embeddings().weight = torch.nn.Parameter(embeddings * (peak / embeddings.abs().max()))
        for path, parameter in model.named_parameters():
            if path.endswith("post_feedforward_layernorm.weight"):
                parameter += 14_000
            elif path.endswith("down_proj.weight") and name not in ("gemma2", "gemma3_text"):
                parameter *= 20_000
    return with_lora(model.half(), some=False)


@pytest.mark.parametrize("name", [f.module.replace("gemma3", "gemma3_text") for f in SERVED if f.outgrows_float16])
def test_a_float16_model_that_outgrows_float16(name: str) -> None:
    """Stock yields NaN. Its errors over float32 embeddings, which make its residual stream float32, are the measure."""
    inputs = BATCHES[0]
    stock = outgrowing(name)
    assert not math.isfinite(measure_stock(stock, inputs, torch.float16).loss)
    truth = measure_truth(stock, inputs)
    stock.get_input_embeddings().float()
    allowed = errors(measure_stock(stock, inputs, torch.float16), truth)
    model = outgrowing(name)
    accelerate(model, families=EVERY)
    fast = measure_fast(model, inputs, torch.float16)
    assert report(model).fast_layers == 2, report(model).lines
    got = errors(fast, truth)
    assert all(a <= 1.5 * b for a, b in zip(got, allowed)), (got, allowed)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert model.get_base_model().model(**inputs.inputs, use_cache=False).last_hidden_state.dtype == torch.float16
