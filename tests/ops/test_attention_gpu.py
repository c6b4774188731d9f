"""Every backend that this GPU has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyralis.ops.attention import attention_backward, attention_forward, backend_for
from pyralis.ops.attention_choice import choose_backend
from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec
from tests.ops.attention_checks import HEADS, causal_by_sequence, check_backend, inputs, make_layout, make_spec
from tests.ops.harness import assert_deterministic

pytestmark = pytest.mark.gpu
GPU_BACKENDS = ("cudnn", "flash", "efficient", "math")  # flex, which compiles for each, has its own test


def skip_refused(
    backend: str, spec: AttentionSpec, layout: AttentionLayout, dtype: torch.dtype, strict: bool = False
) -> None:
    """Skips what the rules refuse on this GPU; `test_attention_choice.py` tests the rules."""
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    refused = choose_backend(spec, layout, dtype, capability, strict).why_not(backend)
    if refused is not None:
        pytest.skip(refused)


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


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gpu_flex(softcap: float | None, layout: str, window: int | None) -> None:
    torch.compiler.reset()  # dynamo compiles at most eight variants of a function, then runs it as it is
    spec, device = make_spec(4, 2, 128, window, softcap), torch.device("cuda", torch.cuda.current_device())
    skip_refused("flex", spec, make_layout(layout, device), torch.bfloat16)
    check_backend("flex", spec, layout, torch.bfloat16, device)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_gpu_float32(layout: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    check_backend("efficient", make_spec(4, 2, 64), layout, torch.float32, device, causal_by_sequence)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("backend", ["flash", "efficient", "flex", "math"])
def test_gpu_deterministic(backend: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else torch refuses matrix products
    device, spec = torch.device("cuda", torch.cuda.current_device()), make_spec(8, 2, 128)
    big = AttentionLayout.padded(2, 1024)
    if layout == "packed":
        bounds = torch.tensor([0, 700, 2048], dtype=torch.int32, device=device)
        big = AttentionLayout.packed(bounds, 1348, 2048)
    skip_refused(backend, spec, big, torch.bfloat16, strict=True)
    tensors, dout = inputs(spec, big, torch.bfloat16, device, 0)

    def run() -> tuple[Tensor, ...]:
        out, saved = attention_forward(*tensors, spec, big, backend=backend)
        return out, *attention_backward(dout, saved)

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert backend_for(spec, big, torch.bfloat16, device).name != "cudnn"
        assert_deterministic(run, times=4)
    finally:
        torch.use_deterministic_algorithms(before)


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
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attention_backward(dout, attention_forward(*tensors, spec, shape)[1])
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, saved = attention_forward(*tensors, spec, shape)
        grads = attention_backward(dout, saved)
    new, _ = inputs(spec, shape, torch.bfloat16, device, 9)
    for old, value in zip(tensors, new):
        old.copy_(value)
    graph.replay()
    expected, saved = attention_forward(*new, spec, shape)
    for a, b in zip((out, *grads), (expected, *attention_backward(dout, saved))):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_outputs_of_any_stride(backend: str) -> None:
    """One shape, `out` with room behind its rows and without: torch up to 2.11 mixes cuDNN's plans of the two up."""
    spec, device = make_spec(4, 2, 64), torch.device("cuda", torch.cuda.current_device())
    layout = AttentionLayout.padded(2, 168)  # of no other test: a plan made there would serve here
    skip_refused(backend, spec, layout, torch.bfloat16)
    tensors, dout = inputs(spec, layout, torch.bfloat16, device, 0)
    _, saved = attention_forward(*(t.float() for t in tensors), spec, layout, backend="math")
    truth = attention_backward(dout.float(), saved)
    for room in (64, 0, 32, 64):
        for given in (dout, dout.repeat(1, 2)[:, :256]):
            out = torch.full((layout.tokens, 256 + room), torch.nan, dtype=torch.bfloat16, device=device)[:, :256]
            _, saved = attention_forward(*tensors, spec, layout, out=out, backend=backend)
            for got, want in zip(attention_backward(given, saved), truth):
                assert (got.float() - want).norm() < 0.02 * want.norm(), room
