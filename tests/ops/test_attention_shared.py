"""Two answers to one prompt: attention as if the prompt had been computed twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyralis.ops.attention import attention, attention_backward, attention_forward, backend_for, reference
from pyralis.ops.attention_choice import choose_backend
from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec
from tests.ops.attention_checks import CPU, inputs, make_layout, make_spec, shared_prompts
from tests.ops.harness import Accuracy, assert_deterministic, oracle_gradients

LENGTHS = st.tuples(st.integers(1, 20), st.integers(0, 15), st.integers(0, 15))


def twice(spec: AttentionSpec, layout: AttentionLayout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every prompt stands before each of its answers; the prompt's second outputs go nowhere."""
    keys = layout.shared
    assert keys is not None
    packed = AttentionLayout.packed(keys.cu_seqlens, layout.max_seqlen, len(keys.rows))
    return reference(*(t[keys.rows] for t in (q, k, v)), spec, packed)[keys.first]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    pairs=st.lists(LENGTHS, min_size=1, max_size=3).filter(lambda pairs: any(a + b for _, a, b in pairs)),
    group=st.integers(1, 3),
    window=st.one_of(st.none(), st.integers(1, 30)),
    backend=st.sampled_from(["flash_cpu", "math"]),
)
def test_any_lengths(pairs: list[tuple[int, int, int]], group: int, window: int | None, backend: str) -> None:
    spec, layout = make_spec(2 * group, 2, 24, window), shared_prompts(CPU, *pairs)
    tensors, dout = inputs(spec, layout, torch.float64, CPU, len(pairs))
    want = oracle_gradients(lambda *qkv: twice(spec, layout, *qkv), tensors, (dout,))
    got = oracle_gradients(lambda *qkv: attention(*qkv, spec, layout, backend), tensors, (dout,))
    for a, b in zip(got[0] + got[1], want[0] + want[1]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_softcaps() -> None:
    spec, layout = make_spec(4, 2, 16, 9, 1.5), make_layout("shared", CPU)
    tensors, _ = inputs(spec, layout, torch.float64, CPU, 0)
    torch.testing.assert_close(attention(*tensors, spec, layout), twice(spec, layout, *tensors), rtol=1e-9, atol=1e-9)


def test_rules() -> None:
    layout = make_layout("shared", CPU)
    llama, windowed = make_spec(32, 8, 128), make_spec(32, 8, 128, 10)
    missing = {"flash_attn": "not installed"}
    for capability, dtype, spec, name in (
        ((9, 0), torch.bfloat16, llama, "flash"),
        ((9, 0), torch.bfloat16, windowed, "flash"),
        ((9, 0), torch.float32, llama, "efficient"),
        ((7, 5), torch.float16, llama, "efficient"),
        ((7, 5), torch.float16, windowed, "math"),
        ((9, 0), torch.bfloat16, make_spec(8, 4, 256, softcap=50.0), "math"),
    ):
        assert choose_backend(spec, layout, dtype, capability, False, missing).name == name
    assert backend_for(llama, layout, torch.float32, CPU).name == "flash_cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash", "efficient", "math"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 1, 64), (4, 2, 128), (2, 1, 256)])
@pytest.mark.parametrize("window", [None, 8])
def test_gpu_backends(
    heads: int, kv_heads: int, dim: int, window: int | None, dtype: torch.dtype, backend: str
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    spec, layout = make_spec(heads, kv_heads, dim, window), shared_prompts(device, (70, 50, 129), (1, 3, 2), (90, 1, 4))
    refused = choose_backend(spec, layout, dtype, torch.cuda.get_device_capability(device), False).why_not(backend)
    if refused is not None:
        pytest.skip(refused)
    accuracy = Accuracy()
    for seed in range(3):
        tensors, dout = inputs(spec, layout, dtype, device, seed)
        wide = [t.double() for t in tensors]
        (want,), wants = oracle_gradients(lambda *qkv: twice(spec, layout, *qkv), wide, (dout.double(),))
        (stock,), stocks = oracle_gradients(lambda *qkv: twice(spec, layout, *qkv), tensors, (dout,))
        out, saved = attention_forward(*tensors, spec, layout, backend=backend)
        accuracy.add("out", out, stock, want)
        for label, *values in zip(("dq", "dk", "dv"), attention_backward(dout, saved), stocks, wants):
            accuracy.add(label, *values)
    accuracy.check()


@pytest.mark.gpu
def test_gpu_deterministic() -> None:
    device, spec = torch.device("cuda", torch.cuda.current_device()), make_spec(8, 2, 128)
    layout = shared_prompts(device, (500, 300, 400), (512, 512, 512))
    tensors, dout = inputs(spec, layout, torch.bfloat16, device, 0)

    def run() -> tuple[Tensor, ...]:
        out, saved = attention_forward(*tensors, spec, layout)
        return out, *attention_backward(dout, saved)

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert_deterministic(run, times=4)
    finally:
        torch.use_deterministic_algorithms(before)
