"""The attention backends by name. Torch's kernels are called as ops: no autograd, and nothing is copied on the way in.

Shapes as in `attention_spec.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pyralis.ops._aten import aten
from pyralis.ops.attention_cpu import FLASH_CPU
from pyralis.ops.attention_flex import flex
from pyralis.ops.attention_parts import Backend, Gradients, Saved, State, by_autograd, heads, repeated, rows, summed
from pyralis.ops.attention_reference import reference
from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec
from pyralis.ops.copy_rows import contiguous_rows


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: AttentionLayout
) -> tuple[Tensor, State]:
    query, key, value = (heads(t, spec, layout).transpose(1, 2) for t in (q, k, v))
    given = {
        "query": query, "key": key, "value": value, "attn_bias": None, "compute_log_sumexp": True,
        "dropout_p": 0.0, "is_causal": spec.causal, "scale": spec.scale,
    }  # fmt: skip
    results = aten("_scaled_dot_product_cudnn_attention")(given)
    return rows(results.pop("output").transpose(1, 2)), results


# By what torch up to 2.11 knows a plan of cuDNN's backward: the strides of `out` and `grad_out` that it was made for.
_planned: dict[tuple[Any, ...], tuple[tuple[int, ...], tuple[int, ...]]] = {}


def _as_planned(inputs: Sequence[Tensor], out: Tensor, dout: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """`out` and `dout` with the strides that they had when cuDNN's backward was first called for such inputs.

    Its plan fixes all strides, but torch up to 2.11 finds plans by those of q, k and v alone: with other strides of
    `out` (rows with room for LoRA's columns, or without) memory that is none of its own would be read for it.
    """
    key = (*((t.shape, t.stride()) for t in inputs), out.dtype, out.device, causal)
    strides = _planned.setdefault(key, (out.stride(), dout.stride()))
    found = (
        t if t.stride() == s else torch.empty_strided(t.shape, s, dtype=t.dtype, device=t.device).copy_(t)
        for t, s in zip((out, dout), strides)
    )
    return next(found), next(found)


def _cudnn_backward(dout: Tensor, saved: Saved) -> Gradients:
    spec, layout = saved.spec, saved.layout
    tensors = (heads(t, spec, layout).transpose(1, 2) for t in (saved.q, saved.k, saved.v, saved.out, dout))
    query, key, value, out, dout = tensors
    out, dout = _as_planned((query, key, value), out, dout, spec.causal)
    given = {
        "grad_out": dout, "query": query, "key": key, "value": value, "out": out,
        "attn_bias": None, "dropout_p": 0.0, "is_causal": spec.causal, "scale": spec.scale,
    }  # fmt: skip
    dq, dk, dv = aten("_scaled_dot_product_cudnn_attention_backward")(given, saved.state).values()
    return rows(dq.transpose(1, 2)), rows(dk.transpose(1, 2)), rows(dv.transpose(1, 2))


def _flash_arguments(spec: AttentionSpec, layout: AttentionLayout) -> dict[str, Any]:
    window = {} if spec.window is None else {"window_size_left": spec.window - 1, "window_size_right": 0}
    return {
        "cum_seq_q": layout.cu_seqlens, "cum_seq_k": layout.key_cu_seqlens, "max_q": layout.max_seqlen,
        "max_k": layout.max_seqlen, "dropout_p": 0.0, "is_causal": spec.causal, "scale": spec.scale, **window,
    }  # fmt: skip


def _flash_heads(t: Tensor, spec: AttentionSpec, layout: AttentionLayout) -> Tensor:
    split = heads(t, spec, layout)
    return split if layout.cu_seqlens is None else split[0]


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: AttentionLayout
) -> tuple[Tensor, State]:
    query, key, value = (_flash_heads(t, spec, layout) for t in (q, k, v))
    given = {"query": query, "key": key, "value": value, "return_debug_mask": False, **_flash_arguments(spec, layout)}
    results = aten("_flash_attention_forward")(given)
    results["logsumexp"] = results.pop("softmax_logsumexp")
    return rows(results.pop("output")), results


def _flash_backward(dout: Tensor, saved: Saved) -> Gradients:
    spec, layout = saved.spec, saved.layout
    tensors = (_flash_heads(t, spec, layout) for t in (dout, saved.q, saved.k, saved.v, saved.out))
    given = {**dict(zip(("grad_out", "query", "key", "value", "out"), tensors)), **_flash_arguments(spec, layout)}
    dq, dk, dv = aten("_flash_attention_backward")(given, saved.state).values()
    return rows(dq), rows(dk), rows(dv)


@lru_cache
def _flash_attn_functions() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    return flash_attn_func, flash_attn_varlen_func


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: AttentionLayout) -> Tensor:
    fixed, variable = _flash_attn_functions()
    options: dict[str, Any] = {
        "softmax_scale": spec.scale,
        "causal": spec.causal,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if spec.window is not None:
        options["window_size"] = (spec.window - 1, 0)
    if spec.softcap is not None:  # since flash_attn 2.6
        options["softcap"] = spec.softcap
    tensors = (_flash_heads(t, spec, layout) for t in (q, k, v))
    if layout.cu_seqlens is None:
        return rows(fixed(*tensors, **options))
    bounds = (layout.cu_seqlens, layout.key_cu_seqlens, layout.max_seqlen, layout.max_seqlen)
    return rows(variable(*tensors, *bounds, **options))


def _efficient_arguments(spec: AttentionSpec, layout: AttentionLayout) -> dict[str, Any]:
    from_the_end = spec.causal and layout.shared is not None  # the kernel's other causal mask
    return {
        "bias": None, "cu_seqlens_q": layout.cu_seqlens, "cu_seqlens_k": layout.key_cu_seqlens,
        "max_seqlen_q": layout.max_seqlen, "max_seqlen_k": layout.max_seqlen, "dropout_p": 0.0,
        "custom_mask_type": 2 if from_the_end else int(spec.causal), "scale": spec.scale,
        **({} if spec.window is None else {"window_size": spec.window}),
    }  # fmt: skip


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: AttentionLayout
) -> tuple[Tensor, State]:
    given = {
        "query": heads(q, spec, layout), "key": repeated(k, spec, layout), "value": repeated(v, spec, layout),
        "compute_log_sumexp": True, **_efficient_arguments(spec, layout),
    }  # fmt: skip
    results = aten("_efficient_attention_forward")(given)
    return rows(results.pop("output")), results


def _efficient_backward(dout: Tensor, saved: Saved) -> Gradients:
    spec, layout = saved.spec, saved.layout
    # Of rows with room behind them (for LoRA's columns) its gradients are wrong: measured on an H100, torch 2.11.
    given = {
        "grad_out_": heads(contiguous_rows(dout), spec, layout), "query": heads(saved.q, spec, layout),
        "key": repeated(saved.k, spec, layout), "value": repeated(saved.v, spec, layout),
        "out": heads(contiguous_rows(saved.out), spec, layout), "bias_requires_grad": False,
        **_efficient_arguments(spec, layout),
    }  # fmt: skip
    if torch.are_deterministic_algorithms_enabled():
        given["num_splits_key"] = 1  # else several programs add to one dq
    dq, dk, dv, _ = aten("_efficient_attention_backward")(given, saved.state).values()
    return rows(dq), summed(dk, spec), summed(dv, spec)


BACKENDS: Mapping[str, Backend] = {
    "cudnn": Backend(_cudnn_forward, _cudnn_backward),
    "flash": Backend(_flash_forward, _flash_backward),
    "flash_attn": by_autograd(_flash_attn),
    "efficient": Backend(_efficient_forward, _efficient_backward),
    "flex": by_autograd(flex),
    "flash_cpu": FLASH_CPU,
    "math": by_autograd(reference),
}
