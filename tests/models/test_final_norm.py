"""The last norm: which one is fast, and that it computes what stock's does."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pyralis.memory.footprint import head_bytes
from pyralis.memory.shape import Assumed, describe_model
from pyralis.models import final_norm
from pyralis.models.causal_lm import causal_lm_loss
from pyralis.models.surgery import accelerate, decoder_layers, restore
from pyralis.models.swap import is_fast, stock_class
from pyralis.ops._triton import Gpu, kernels_on_cpu
from pyralis.ops.linear_cross_entropy import linear_cross_entropy
from tests.memory.live import LiveBytes
from tests.memory.test_footprint import describe
from tests.tiny import FAMILIES, build_tiny_model, build_tiny_variant

SERVED = [family for family in FAMILIES if family not in ("gpt2", "bloom", "mixtral", "qwen2_moe")]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes that the fused norm is called with from now on."""
    seen: list[torch.dtype] = []
    whole = final_norm.rms_norm

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(x.dtype)
        return whole(x, *args, **kwargs)

    monkeypatch.setattr(final_norm, "rms_norm", watched)
    return seen


def answers(norm: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    norm.weight.grad = None
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(dy)
    return y.detach(), x.grad, norm.weight.grad  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SERVED)
def test_it_is_as_exact_as_stock(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build_tiny_model(family).to(dtype)
    accelerate(model)
    norm, seen = model.model.norm, calls(monkeypatch)
    assert is_fast(norm)
    stock = copy.deepcopy(norm)
    assert is_fast(stock)
    stock.__class__ = stock_class(type(stock))
    truth = copy.deepcopy(stock).double()
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn((2, 7, 64), generator=generator).to(dtype) for _ in range(2))
    x[0, 0] = 0
    with kernels_on_cpu():
        found = answers(norm, x, dy)
    assert seen == [dtype]
    # Stock rounds an oracle's input to float32 on the way, which is enough here.
    for ours, theirs, true in zip(found, answers(stock, x, dy), answers(truth, x.double(), dy.double())):
        assert ours.dtype == theirs.dtype
        error, stocks = ((a.double() - true).norm() / true.norm() for a in (ours, theirs))
        assert error <= 1.1 * stocks + 3e-7


def test_losses_and_gradients_of_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, ids = calls(monkeypatch), torch.arange(4, 28).view(2, 12)
    results = []
    for fast in (True, False):
        torch.manual_seed(0)
        model: Any = get_peft_model(build_tiny_model(), LoraConfig(r=4, init_lora_weights=False))
        accelerate(model)
        if not fast:
            monkeypatch.setattr(final_norm, "_serves", lambda *_: False)
        with kernels_on_cpu():
            loss = causal_lm_loss(model, {"input_ids": ids}, ids)
            loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert len(seen) == 1
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6)
    for name, gradient in results[1][1].items():
        assert torch.allclose(results[0][1][name], gradient, rtol=1e-4, atol=1e-7), name


def test_what_stays_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, x = calls(monkeypatch), torch.randn(2, 64)
    model: Any = build_tiny_model()
    accelerate(model)
    norm = model.model.norm
    norm(x)  # no kernels
    with kernels_on_cpu():
        norm(x.bfloat16())  # of another dtype than the weight
        norm(x[:0])
    assert not seen
    restore(model)
    assert not is_fast(norm)
    for odd in (nn.LayerNorm(64), nn.Identity(), copy.deepcopy(norm)):
        if type(odd) is type(norm):
            odd.forward = odd.forward  # replaced on the instance
        model.model.norm = odd
        accelerate(model)
        assert not is_fast(odd)


def test_a_plan_knows_it_before_the_model_is_fast() -> None:
    """`pyralis plan` describes models that nothing has been swapped in."""
    model: Any = build_tiny_model()
    assert describe(model).fused_norm
    half = build_tiny_model("gemma").half()  # whose residual stream is float32 then, and its norm's weight is not
    assert not describe(half).fused_norm
    assumed = Assumed(four_bit=False, dtype=torch.float16)
    for family, fused in (("llama", True), ("gemma", False)):
        model = build_tiny_model(family)
        assert describe_model(model, decoder_layers(model), Gpu((7, 0), 2), assumed=assumed).fused_norm is fused
    model.model.norm = nn.LayerNorm(64)
    assert not describe(model).fused_norm
    tuned: Any = get_peft_model(build_tiny_model(), LoraConfig(r=4, modules_to_save=["model.norm"]))
    accelerate(tuned)
    base = tuned.get_base_model()
    assert not describe(base).fused_norm
    assert not describe_model(base, decoder_layers(tuned), Gpu((8, 0), 2), assumed=Assumed(False)).fused_norm


def test_compiling_looks_at_none_of_it() -> None:
    model: Any = build_tiny_model()
    accelerate(model)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a cache that is traced through
        compiled = torch.compile(model.model.norm, backend="eager", fullgraph=True)
        x = torch.randn(2, 64)
        assert torch.equal(compiled(x), model.model.norm(x))


def test_a_second_derivative_is_refused() -> None:
    """And not left out: fused layers below it would see a gradient that depends on nothing."""
    model: Any = build_tiny_model()
    accelerate(model)
    x = torch.randn(2, 64, requires_grad=True)
    with kernels_on_cpu():
        (gradient,) = torch.autograd.grad(model.model.norm(x).square().sum(), [x], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.square().sum().backward()


@pytest.mark.parametrize(("dtype", "supervised"), [(torch.float32, 40), (torch.bfloat16, 128)])
def test_the_heads_memory_is_what_is_predicted(dtype: torch.dtype, supervised: int) -> None:
    model: Any = build_tiny_variant("llama", tie_word_embeddings=False)
    model.to(dtype).requires_grad_(False)
    accelerate(model)
    shape, tokens = describe(model), 40 if supervised == 40 else 136
    assert shape.fused_norm
    labels = torch.arange(tokens) % 300
    labels[supervised:] = -100
    with kernels_on_cpu(), LiveBytes(watched=True) as live:
        x = torch.randn((tokens, 64), dtype=dtype, requires_grad=True)
        hidden = model.model.norm(x)
        loss = linear_cross_entropy(
            hidden, model.lm_head.weight, labels, chunk_bytes=1 << 20, supervised_rows=supervised
        )
        forward, live.peak = live.peak, 0
        del hidden
        loss.backward()
    wanted = head_bytes(shape, tokens, supervised, 1 << 20)
    scalars = 32 * tokens + 64  # losses, labels, places of rows
    assert wanted.backward <= live.peak <= wanted.backward + scalars
    assert wanted.forward <= forward <= wanted.forward + scalars
