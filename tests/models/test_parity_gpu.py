"""Whole models on the GPU, through the real kernels: errors to float64 against those of stock on the same GPU.

The truth is stock transformers in float64, a layer at a time (`pyralis.verify.exact`, which
`tests/verify/test_exact.py` holds to another truth).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyralis.models.checkpointing import choose_save_policy
from pyralis.models.families import FAMILIES as SERVED
from pyralis.models.load import ModelSettings, load_model
from pyralis.models.policy import POLICIES
from pyralis.models.surgery import accelerate, decoder_layers, report, restore
from pyralis.verify.batches import LAYOUTS, Batch, Example, make_batches
from pyralis.verify.measure import Outcome, measure_fast, measure_stock, measure_truth
from tests.models.fast_models import padding_computed
from tests.models.test_parity import NAMES, with_lora
from tests.tiny import FAMILIES, VARIANTS, build_tiny_model, make_tiny_model

pytestmark = pytest.mark.gpu
EVERY = tuple(family.name for family in SERVED)
# Heads of 64 and rows of a few hundred tokens: what the fast attention backends and tiles are made for.
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "initializer_range": 0.05,
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOORS = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}
# In half precision these compile FlexAttention for each layout, which takes a minute: one case each.
COMPILED = [name for name in NAMES if VARIANTS.get(name, (name,))[0] == "gemma2"]
OTHERS = [(dtype, mode) for mode in ("qlora", "full") for dtype in DTYPES] + [("fp16", "lora")]
ROWS, TOKENS = 2, 200


def cases() -> Iterator[tuple[str, str, str, str]]:
    """LoRA in float32 and bfloat16 in every layout; each other dtype and mode in one of them, a different one for each
    name. The slow ones come first."""
    yield from ((name, "left", "bf16", "lora") for name in COMPILED)
    for place, name in enumerate(NAMES):
        many = [(layout, dtype, "lora") for dtype in ("fp32", "bf16") for layout in LAYOUTS]
        many += [(LAYOUTS[(place + shift) % len(LAYOUTS)], *other) for shift, other in enumerate(OTHERS)]
        yield from ((name, *case) for case in many if case[1] == "fp32" or name not in COMPILED)


def build(name: str, mode: str, dtype: torch.dtype, folder: Path) -> Any:
    """Full training has float32 weights, LoRA a base in `dtype`, QLoRA an NF4 one that computes in it."""
    family, fields = VARIANTS.get(name, (name, {}))
    sizes = SIZES if "head_dim" not in FAMILIES[family] else {**SIZES, "head_dim": fields.get("head_dim", 64)}
    fields = {**fields, **sizes}
    if mode == "full":
        return build_tiny_model(family, **fields).cuda().train()
    if mode == "lora":
        return with_lora(build_tiny_model(family, **fields).to(dtype), some=False).cuda()
    make_tiny_model(folder, family, **fields)
    settings = ModelSettings(str(folder), train_mode="qlora")
    return with_lora(load_model(settings, device=torch.device("cuda", 0), dtype=dtype).model, some=False).cuda()


def batch(layout: str) -> Batch:
    ids = torch.randint(4, 500, (5, TOKENS), generator=torch.Generator().manual_seed(5)).tolist()
    examples = [Example(row, [-100] * 20 + row[20:]) for row in ids]
    return dict(zip(LAYOUTS, make_batches(examples, ROWS, TOKENS, torch.device("cuda"))))[layout]  # type: ignore[index]


def error(got: Outcome, want: Outcome) -> float:
    """Of all gradients together."""
    assert got.gradients.keys() == want.gradients.keys()
    a, b = (torch.cat([o.gradients[name].double().flatten() for name in want.gradients]) for o in (got, want))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("name", "layout", "dtype", "mode"), cases())
def test_parity(name: str, layout: str, dtype: str, mode: str, tmp_path: Path) -> None:
    """Padded rows are computed without their padding, where the attention of the model takes any lengths."""
    check(name, layout, dtype, mode, tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("place", "name"), enumerate(name for name in NAMES if name not in COMPILED))
def test_with_the_padding(place: int, name: str, dtype: str, tmp_path: Path) -> None:
    with padding_computed():
        check(name, "left" if place % 3 == 0 else "right", dtype, "lora", tmp_path)


def check(name: str, layout: str, dtype: str, mode: str, tmp_path: Path) -> None:
    computed, inputs = DTYPES[dtype], batch(layout)
    model = build(name, mode, computed, tmp_path)
    truth, stock = measure_truth(model, inputs), measure_stock(model, inputs, computed)
    accelerate(model, families=EVERY)
    fast = measure_fast(model, inputs, computed)
    assert report(model).fast_layers == len(decoder_layers(model)), report(model).lines
    floor = FLOORS[computed]
    tokens = [float((o.token_losses.double() - truth.token_losses).norm()) for o in (fast, stock)]
    # The mean of n losses is off by about a token's error over sqrt(n), either way: stock's may happen to be none.
    luck = 3 * tokens[1] / truth.token_losses.numel()
    assert abs(fast.loss - truth.loss) <= abs(stock.loss - truth.loss) + luck + floor * truth.loss
    assert tokens[0] <= 1.5 * tokens[1] + floor * float(truth.token_losses.norm()), tokens
    assert error(fast, truth) <= 1.5 * error(stock, truth) + floor, (error(fast, truth), error(stock, truth))


@pytest.mark.parametrize("mode", ["lora", "qlora", "full"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_every_policy_gives_the_same_gradients(name: str, mode: str, tmp_path: Path) -> None:
    model, inputs = build(name, mode, torch.bfloat16, tmp_path).train(), batch("packed")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for policy in POLICIES:
        accelerate(model, families=EVERY)
        choose_save_policy(decoder_layers(model), policy)
        found.append(measure_fast(model, inputs, torch.bfloat16))
        assert report(model).fast_layers == len(decoder_layers(model)), report(model).lines
        restore(model)
    for other in found[1:]:
        assert other.loss == found[0].loss
        assert all(torch.equal(other.gradients[key], value) for key, value in found[0].gradients.items())
