"""Every backend against float64, gradients included: those of the CPU here, those of a GPU there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from pyralis.ops import attention as module
from pyralis.ops.attention import attention, attention_backward, attention_forward, backend_for, reference
from pyralis.ops.attention_choice import choose_backend
from pyralis.ops.attention_parts import Saved
from pyralis.ops.attention_reference import visible
from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec
from tests.ops.harness import Accuracy, assert_deterministic, oracle_gradients, random

CPU = torch.device("cpu")
CPU_BACKENDS = ("flash_cpu", "math")
GPU_BACKENDS = ("cudnn", "flash", "efficient", "flex", "math")
HEADS = ((4, 1, 64), (7, 1, 80), (4, 4, 96), (4, 2, 128), (2, 1, 256))


def make_spec(
    heads: int, kv_heads: int, dim: int, window: int | None = None, softcap: float | None = None
) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, dim, dim**-0.5, window=window, softcap=softcap)


def make_layout(name: str, device: torch.device) -> AttentionLayout:
    if name == "padded":
        return AttentionLayout.padded(2, 37)
    if name == "packed":
        return AttentionLayout.packed(torch.tensor([0, 13, 13, 14, 70], dtype=torch.int32, device=device), 56, 70)
    assert name == "left_padded"
    return AttentionLayout.left_padded(torch.tensor([5, 0], device=device), 37)


def inputs(
    spec: AttentionSpec, layout: AttentionLayout, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(q, k, v) as columns of one buffer, and dout, columns of a wider one."""
    widths = [n * spec.head_dim for n in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)]
    q, k, v = random(layout.tokens, sum(widths), dtype=dtype, device=device, seed=seed).split(widths, 1)
    dout = random(layout.tokens, widths[0] + 16, dtype=dtype, device=device, seed=seed + 1)[:, : widths[0]]
    return (q, k, v), dout


def by_hand(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, starts: list[int], ends: list[int]) -> Tensor:
    """Token by token and head by head, from the definition."""
    D, out = spec.head_dim, torch.empty_like(q)
    for start, end in zip(starts, ends):
        for i in range(start, end):
            first = start if spec.window is None else max(start, i - spec.window + 1)
            seen = slice(first, i + 1)
            for head in range(spec.num_heads):
                kv = slice(head // spec.group * D, (head // spec.group + 1) * D)
                scores = k[seen, kv] @ q[i, head * D : (head + 1) * D] * spec.scale
                if spec.softcap is not None:
                    scores = spec.softcap * torch.tanh(scores / spec.softcap)
                out[i, head * D : (head + 1) * D] = scores.softmax(0) @ v[seen, kv]
    return out


def stock_attention(spec: AttentionSpec, layout: AttentionLayout, *, eager: bool) -> Callable[..., Tensor]:
    """What transformers runs: eager attention or SDPA, with a 4-D mask."""
    hidden = ~visible(spec, layout, CPU if layout.cu_seqlens is None else layout.cu_seqlens.device)
    module = SimpleNamespace(num_key_value_groups=spec.group, head_dim=spec.head_dim, training=False)

    def run(*qkv: Tensor) -> Tensor:
        q, k, v = (t.view(layout.batch, layout.seq, -1, spec.head_dim).transpose(1, 2) for t in qkv)
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill(hidden.to(q.device), torch.finfo(q.dtype).min)[None, None]
        if eager or spec.softcap is not None:
            out, _ = eager_attention_forward(module, q, k, v, bias, scaling=spec.scale, softcap=spec.softcap)
            return out.reshape(layout.tokens, -1)
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=spec.scale, enable_gqa=spec.group > 1)
        return out.transpose(1, 2).reshape(layout.tokens, -1)

    return run


def check_backend(name: str, spec: AttentionSpec, layout_name: str, dtype: torch.dtype, device: torch.device) -> None:
    accuracy = Accuracy()
    layout = make_layout(layout_name, device)
    for seed in range(3):
        tensors, dout = inputs(spec, layout, dtype, device, seed)

        def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return reference(q, k, v, spec, layout)

        (want,), wants = oracle_gradients(exact, [t.double() for t in tensors], (dout.double(),))
        (stock,), stocks = oracle_gradients(stock_attention(spec, layout, eager=name == "math"), tensors, (dout,))
        saved = attention_forward(*tensors, spec, layout, backend=name)
        accuracy.add("out", saved.out, stock, want)
        for label, *values in zip(("dq", "dk", "dv"), attention_backward(dout, saved), stocks, wants):
            accuracy.add(label, *values)
    accuracy.check()


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_reference_is_the_definition(window: int | None, softcap: float | None) -> None:
    spec = make_spec(4, 2, 8, window, softcap)
    for name, ends in (("padded", [37, 74]), ("packed", [13, 14, 70]), ("left_padded", [5, 37, 74])):
        layout = make_layout(name, CPU)
        tensors, _ = inputs(spec, layout, torch.float64, CPU, 0)
        expected = by_hand(*tensors, spec, [0, *ends[:-1]], ends)
        torch.testing.assert_close(reference(*tensors, spec, layout), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_reference_is_stock_eager_attention(softcap: float | None, dtype: torch.dtype) -> None:
    spec, layout = make_spec(4, 2, 64, 9, softcap), make_layout("packed", CPU)
    tensors, _ = inputs(spec, layout, dtype, CPU, 0)
    expected = stock_attention(spec, layout, eager=True)(*tensors)
    if dtype == torch.bfloat16:
        assert torch.equal(reference(*tensors, spec, layout), expected)
    else:
        torch.testing.assert_close(reference(*tensors, spec, layout), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("layout", ["padded", "packed", "left_padded"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_cpu_backends(heads: int, kv_heads: int, dim: int, layout: str, backend: str) -> None:
    check_backend(backend, make_spec(heads, kv_heads, dim), layout, torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_cpu_half(layout: str, dtype: torch.dtype) -> None:
    check_backend("flash_cpu", make_spec(4, 1, 64), layout, dtype, CPU)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("layout", ["padded", "packed", "left_padded"])
def test_windows(layout: str, backend: str) -> None:
    for window in (2, 8, 36):
        check_backend(backend, make_spec(4, 2, 64, window), layout, torch.float32, CPU)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_softcaps(layout: str) -> None:
    for window in (None, 8):
        check_backend("math", make_spec(4, 2, 64, window, 1.5), layout, torch.float32, CPU)
        assert (
            backend_for(make_spec(4, 2, 64, window, 1.5), make_layout(layout, CPU), torch.float32, CPU).name == "math"
        )


def test_not_causal() -> None:
    spec, layout = replace(make_spec(4, 2, 64), causal=False), AttentionLayout.padded(2, 19)
    tensors, dout = inputs(spec, layout, torch.float64, CPU, 0)
    want = oracle_gradients(lambda *qkv: reference(*qkv, spec, layout), tensors, (dout,))
    got = oracle_gradients(lambda *qkv: attention(*qkv, spec, layout), tensors, (dout,))
    for a, b in zip(got[0] + got[1], want[0] + want[1]):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_packed_is_sequences_apart(backend: str) -> None:
    spec, layout = make_spec(4, 2, 64, window=20), make_layout("packed", CPU)
    tensors, dout = inputs(spec, layout, torch.float32, CPU, 0)
    whole = attention_forward(*tensors, spec, layout, backend=backend)
    grads = attention_backward(dout, whole)
    for start, end in pairwise([0, 13, 14, 70]):
        rows = slice(start, end)
        alone = AttentionLayout.padded(1, end - start)
        one = attention_forward(*(t[rows] for t in tensors), spec, alone, backend=backend)
        torch.testing.assert_close(whole.out[rows], one.out)
        for a, b in zip(grads, attention_backward(dout[rows], one)):
            torch.testing.assert_close(a[rows], b)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_padding_reaches_no_real_token(backend: str) -> None:
    """Other padding, same results; and no gradient flows into padding whose own outputs have none."""
    spec = make_spec(4, 2, 64)
    starts = torch.tensor([5, 0, 20])
    left = torch.arange(3)[:, None] * 24 + torch.arange(24) < torch.arange(3)[:, None] * 24 + starts[:, None]
    for padding, layout in (
        (left.flatten(), AttentionLayout.left_padded(starts, 24)),
        (left.flip(1).flatten(), AttentionLayout.padded(3, 24)),
    ):
        (q, k, v), dout = inputs(spec, layout, torch.float32, CPU, 0)
        dout = dout.masked_fill(padding[:, None], 0)
        results = []
        for value in (0.0, 7.0):
            tensors = [t.masked_fill(padding[:, None], value) for t in (q, k, v)]
            saved = attention_forward(*tensors, spec, layout, backend=backend)
            grads = attention_backward(dout, saved)
            assert saved.out.isfinite().all()
            assert all(not g[padding].any() for g in grads)
            results.append([t[~padding] for t in (saved.out, *grads)])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_given_buffers(backend: str) -> None:
    spec, layout = make_spec(4, 2, 64), make_layout("packed", CPU)
    tensors, dout = inputs(spec, layout, torch.float32, CPU, 0)
    plain = attention_forward(*tensors, spec, layout, backend=backend)
    wide = torch.full((70, 300), 777.0)
    saved = attention_forward(*tensors, spec, layout, out=wide[:, :256], backend=backend)
    assert saved.out.data_ptr() == wide.data_ptr()
    assert torch.equal(saved.out, plain.out)
    assert (wide[:, 256:] == 777).all()
    fused = torch.full((70, 512 + 8), 777.0)
    buffers = tuple(fused[:, :512].split([256, 128, 128], 1))
    grads = attention_backward(dout, saved, out=buffers)
    for got, want in zip(grads, attention_backward(dout, plain)):
        assert torch.equal(got, want)
    assert grads[1].data_ptr() == fused[:, 256:].data_ptr()
    assert (fused[:, 512:] == 777).all()


def test_autograd_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, layout = make_spec(7, 1, 16), make_layout("packed", CPU)
    tensors, dout = inputs(spec, layout, torch.float64, CPU, 0)
    want = oracle_gradients(lambda *qkv: reference(*qkv, spec, layout), tensors, (dout,))
    for backend in (None, *CPU_BACKENDS):
        got = oracle_gradients(lambda *qkv, b=backend: attention(*qkv, spec, layout, b), tensors, (dout,))
        for a, b in zip(got[0] + got[1], want[0] + want[1]):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    q, k, v = (t.detach().clone().requires_grad_() for t in tensors)
    attention(q, k, v, spec, layout).sum().backward()  # an expanded gradient without strides
    assert q.grad is not None
    real = module.attention_backward
    monkeypatch.setattr(module, "attention_backward", lambda d, s: (real(d, s)[0] * 1.01, *real(d, s)[1:]))
    wrong = oracle_gradients(lambda *qkv: attention(*qkv, spec, layout, "flash_cpu"), tensors, (dout,))
    assert not torch.allclose(wrong[1][0], want[1][0], rtol=1e-3)


def test_choice_is_remembered_and_heeds_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_choices", {})
    spec, layout = make_spec(4, 2, 64), make_layout("padded", CPU)
    choice = backend_for(spec, layout, torch.float32, CPU)
    assert backend_for(spec, layout, torch.float32, CPU) is choice
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert backend_for(spec, layout, torch.float32, CPU).why_not("cudnn") == "needs a GPU"
        assert len(module._choices) == 2


def test_a_backend_that_fails_when_tried_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_choices", {})
    monkeypatch.setattr(module, "_try", lambda name, *_: "failed when tried: no" if name == "flash_cpu" else None)
    choice = backend_for(make_spec(4, 2, 64), make_layout("padded", CPU), torch.float32, CPU)
    assert choice.name == "math"
    assert choice.why_not("flash_cpu") == "failed when tried: no"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    group=st.integers(1, 7),
    window=st.one_of(st.none(), st.integers(1, 50)),
    dim=st.sampled_from([8, 24, 64]),
)
def test_any_lengths(lengths: list[int], group: int, window: int | None, dim: int) -> None:
    spec = make_spec(2 * group, 2, dim, window)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    layout = AttentionLayout.packed(bounds, max(lengths), sum(lengths))
    tensors, dout = inputs(spec, layout, torch.float64, CPU, sum(lengths))
    want = oracle_gradients(lambda *qkv: reference(*qkv, spec, layout), tensors, (dout,))
    got = oracle_gradients(lambda *qkv: attention(*qkv, spec, layout, "flash_cpu"), tensors, (dout,))
    for a, b in zip(got[0] + got[1], want[0] + want[1]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def skip_refused(
    backend: str, spec: AttentionSpec, layout: AttentionLayout, dtype: torch.dtype, strict: bool = False
) -> None:
    """Skips what the rules refuse on this GPU; `test_attention_choice.py` tests the rules."""
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    refused = choose_backend(spec, layout, dtype, capability, strict).why_not(backend)
    if refused is not None:
        pytest.skip(refused)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["padded", "packed", "left_padded"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize("window", [None, 8])
def test_gpu_backends(
    heads: int, kv_heads: int, dim: int, window: int | None, layout: str, dtype: torch.dtype, backend: str
) -> None:
    spec, device = make_spec(heads, kv_heads, dim, window), torch.device("cuda", torch.cuda.current_device())
    skip_refused(backend, spec, make_layout(layout, device), dtype)
    check_backend(backend, spec, layout, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("window", [None, 8])
def test_gpu_softcaps(layout: str, window: int | None) -> None:
    spec, device = make_spec(4, 2, 128, window, 2.0), torch.device("cuda", torch.cuda.current_device())
    skip_refused("flex", spec, make_layout(layout, device), torch.bfloat16)
    check_backend("flex", spec, layout, torch.bfloat16, device)


@pytest.mark.gpu
def test_gpu_float32() -> None:
    for layout in ("padded", "packed"):
        check_backend("efficient", make_spec(4, 2, 64), layout, torch.float32, torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("backend", ["flash", "efficient", "flex", "math"])
def test_gpu_deterministic(backend: str, layout: str) -> None:
    device, spec = torch.device("cuda", torch.cuda.current_device()), make_spec(8, 2, 128)
    big = AttentionLayout.padded(2, 1024)
    if layout == "packed":
        bounds = torch.tensor([0, 700, 2048], dtype=torch.int32, device=device)
        big = AttentionLayout.packed(bounds, 1348, 2048)
    skip_refused(backend, spec, big, torch.bfloat16, strict=True)
    tensors, dout = inputs(spec, big, torch.bfloat16, device, 0)

    def run() -> tuple[Tensor, ...]:
        saved = attention_forward(*tensors, spec, big, backend=backend)
        return saved.out, *attention_backward(dout, saved)

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert backend_for(spec, big, torch.bfloat16, device).name != "cudnn"
        assert_deterministic(run, times=4)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_gpu_default_choice_in_a_graph(layout: str) -> None:
    """The chosen backend passes its own trial, takes wide rows, and replays with other values."""
    device, spec = torch.device("cuda", torch.cuda.current_device()), make_spec(8, 2, 128)
    shape = make_layout(layout, device)
    tensors, dout = inputs(spec, shape, torch.bfloat16, device, 0)
    choice = backend_for(spec, shape, torch.bfloat16, device)
    for rejection in choice.rejected:
        assert "computes something else" not in rejection.reason, rejection
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        attention_backward(dout, attention_forward(*tensors, spec, shape))
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        saved = attention_forward(*tensors, spec, shape)
        grads = attention_backward(dout, saved)
    new, _ = inputs(spec, shape, torch.bfloat16, device, 9)
    for old, value in zip(tensors, new):
        old.copy_(value)
    graph.replay()
    expected = attention_forward(*new, spec, shape)
    for a, b in zip((saved.out, *grads), (expected.out, *attention_backward(dout, expected))):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_gpu_trial_refuses_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    device, spec = torch.device("cuda", torch.cuda.current_device()), make_spec(4, 2, 64)
    right = module.BACKENDS["efficient"]

    def wrong(dout: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = right.backward(dout, saved)
        return dq * 1.05, dk, dv

    monkeypatch.setattr(module, "BACKENDS", {**module.BACKENDS, "efficient": replace(right, backward=wrong)})
    reason = module._try("efficient", spec, False, torch.float16, device)
    assert "computes something else" in str(reason)
