"""Attention over rows of tokens: causal, grouped heads, windows, softcaps; padded and packed; on the best backend.

`attention_forward` and `attention_backward` are the primitives of a hand-written layer, `attention` the differentiable
function. `backend_for` tells which backend serves a call and why the faster ones do not; `attention_choice.py` has the
rules, `attention_backends.py` the backends. A backend is tried once on the GPU it will run on,
against the reference: one that raises or computes something else there is never used.

Shapes: T tokens, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyralis.ops._shortage import ran_short
from pyralis.ops.attention_backends import BACKENDS
from pyralis.ops.attention_choice import Choice, Rejection, choose_backend
from pyralis.ops.attention_parts import Saved
from pyralis.ops.attention_reference import reference
from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec, SharedKeys
from pyralis.ops.copy_rows import copy_rows

__all__ = [
    "AttentionLayout", "AttentionSpec", "Choice", "Rejection", "Saved", "SharedKeys", "attention", "attention_backward",
    "attention_forward", "backend_for", "choose_backend", "reference",
]  # fmt: skip

PROBE_ERROR = 0.03  # of a gradient's norm: bf16 leaves 0.005, a mask that is off by one token more than 0.1
SWITCHES: dict[str, Callable[[], bool]] = {  # what torch's `sdpa_kernel` and `enable_*_sdp` set
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
}

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_choices: dict[tuple[Any, ...], Choice] = {}


def _without_grad(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`torch.no_grad()`, without its 2 us where gradients are off already, as in a hand-written layer."""

    @wraps(function)
    def called(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return called


@lru_cache
def _not_installed(device_type: str) -> dict[str, str]:
    missing = {}
    if device_type != "cpu":
        missing["flash_cpu"] = "needs a CPU"
    if torch.version.hip is not None or not torch.backends.cudnn.is_available():
        missing["cudnn"] = "this torch has no cuDNN"
    if importlib.util.find_spec("flash_attn") is None:
        missing["flash_attn"] = "the package flash_attn is not installed"
    return missing


def backend_for(spec: AttentionSpec, layout: AttentionLayout, dtype: torch.dtype, device: torch.device) -> Choice:
    """The backend that `attention_forward` takes here. The first question of a kind tries the candidate, later ones
    are answered from memory.

    Heeds `torch.use_deterministic_algorithms` and the switches of `torch.nn.attention.sdpa_kernel`.
    """
    spec = spec.within(layout.max_seqlen)
    deterministic = torch.are_deterministic_algorithms_enabled()
    off = tuple(name for name, enabled in SWITCHES.items() if not enabled())
    kind = (layout.cu_seqlens is not None, layout.shared is not None, layout.seq == 1)
    key = (spec, *kind, dtype, device, deterministic, off)
    if (known := _choices.get(key)) is not None:
        return known
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the attention backend was never chosen for this call: run it once before capturing a graph")
    missing = {**_not_installed(device.type), **dict.fromkeys(off, "switched off by torch.backends.cuda")}
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    while True:
        choice = choose_backend(spec, layout, dtype, capability, deterministic, missing)
        if device.type != "cuda" or choice.name == "math":
            break
        failure = _try(choice.name, spec, _trial(layout, device), dtype, device)
        if failure is None:
            break
        missing[choice.name] = failure
    _choices[key] = choice
    return choice


def _trial(layout: AttentionLayout, device: torch.device) -> AttentionLayout:
    """A small layout of the same kind."""
    if layout.cu_seqlens is None:
        return AttentionLayout.padded(2, 72)
    bounds = torch.tensor([0, 41, 144], dtype=torch.int32, device=device)
    if layout.shared is None:
        return AttentionLayout.packed(bounds, 103, 144)
    # a prompt of 30 tokens with answers of 11 and 103
    tokens = torch.arange(144, device=device)
    prompt = tokens[:30]
    keys = SharedKeys(
        torch.tensor([0, 41, 174], dtype=torch.int32, device=device),
        torch.cat([tokens[:41], prompt, tokens[41:]]),
        torch.where(tokens < 41, tokens, tokens + 30),
        torch.stack([prompt, prompt + 41]),
    )
    return AttentionLayout.shared_prompts(bounds, keys, 133, 144)


def _try(
    name: str, spec: AttentionSpec, layout: AttentionLayout, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a backend cannot be used on a device: what it raised in a small call, or that its result is wrong."""
    spec = spec if spec.window is None else replace(spec, window=min(spec.window, 33))
    generator = torch.Generator().manual_seed(0)  # the caller's random state stays as it is
    widths = [heads * spec.head_dim for heads in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)]
    fused, dout = (
        torch.randn(layout.tokens, columns, generator=generator, device="cpu").to(device, dtype)
        for columns in (sum(widths), widths[0])
    )
    q, k, v = fused.split(widths, 1)
    try:
        out, saved = attention_forward(q, k, v, spec, layout, backend=name)
        results = (out, *attention_backward(dout, saved))
    except Exception as error:  # cuDNN's, Triton's (no RuntimeError), a compiler's: the next backend is tried
        if ran_short(error):  # which tells nothing of the backend
            raise
        return (
            f"failed when tried: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        )
    exact, saved = attention_forward(q.float(), k.float(), v.float(), spec, layout, backend="math")
    for got, want in zip(results, (exact, *attention_backward(dout.float(), saved))):
        error_norm = float((got.float() - want).norm() / want.norm())
        if not error_norm < PROBE_ERROR:
            return f"computes something else here: off by {error_norm:.1%} of the norm"
    return None


@_without_grad
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: AttentionLayout, *, out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Saved]:  # fmt: skip
    """The output [T, H * D], and what its backward needs; no autograd.

    q: [T, H * D], k and v: [T, G * D], rows of any stride: columns of one fused buffer are not copied. out: a buffer of
    any row stride that the output is copied into once (none of torch's kernels writes into one). backend: forces one.
    """
    tokens, head_dim = layout.tokens, spec.head_dim
    for name, t, heads in (("q", q, spec.num_heads), ("k", k, spec.num_kv_heads), ("v", v, spec.num_kv_heads)):
        expected = (tokens, heads * head_dim)
        assert t.shape == expected, f"{name}: {tuple(t.shape)}, expected {expected}"
        assert t.stride(1) == 1, f"{name}: the last dimension is not contiguous"
    spec = spec.within(layout.max_seqlen)
    name = backend_for(spec, layout, q.dtype, q.device).name if backend is None else backend
    keys, values = (k, v) if layout.shared is None else (layout.shared.spread(k), layout.shared.spread(v))
    result, state = BACKENDS[name].forward(q, keys, values, spec, layout)
    if out is not None:
        result = copy_rows(out, result)
    return result, Saved(name, spec, layout, q, k, v, result, state)


@_without_grad
def attention_backward(
    dout: Tensor, saved: Saved, *, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq [T, H * D], dk, dv [T, G * D]) from dout [T, H * D] of any row stride; once per forward.

    out: buffers of any row stride (columns of one fused gradient), which cost a copy each.
    """
    dout, shared = dout.to(saved.out.dtype), saved.layout.shared
    given = saved if shared is None else replace(saved, k=shared.spread(saved.k), v=shared.spread(saved.v))
    grads = BACKENDS[saved.backend].backward(dout if dout.stride(1) == 1 else dout.contiguous(), given)
    if shared is not None:
        grads = (grads[0], shared.gathered(grads[1]), shared.gathered(grads[2]))
    if out is None:
        return grads
    for buffer, grad in zip(out, grads):
        copy_rows(buffer, grad)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: AttentionLayout, backend: str | None
    ) -> Tensor:
        out, saved = attention_forward(q, k, v, spec, layout, backend=backend)
        ctx.save_for_backward(q, k, v, out)
        ctx.rest = (saved.backend, saved.spec, layout, saved.state)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        backend, spec, layout, state = ctx.rest
        q, k, v, out = ctx.saved_tensors
        grads = attention_backward(dout, Saved(backend, spec, layout, q, k, v, out, state))
        return *grads, None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: AttentionLayout, backend: str | None = None
) -> Tensor:
    """[T, H * D], differentiable in q [T, H * D], k and v [T, G * D]. For standalone use."""
    return _Attention.apply(q, k, v, spec, layout, backend)
