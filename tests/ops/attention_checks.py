"""What the attention tests share: inputs as a layer has them, stock attention, and the comparison with float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from pyralis.ops.attention import attention_backward, attention_forward, reference
from pyralis.ops.attention_reference import visible
from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec, SharedKeys
from tests.ops.harness import Accuracy, oracle_gradients, random

CPU = torch.device("cpu")
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
    if name == "shared":
        return shared_prompts(device, (7, 5, 12), (1, 3, 2), (9, 0, 4))
    assert name == "left_padded"
    return AttentionLayout.left_padded(torch.tensor([5, 0], device=device), 37)


def shared_prompts(device: torch.device, *pairs: tuple[int, int, int]) -> AttentionLayout:
    """Lengths of a prompt and its two answers -> the layout of p a b p a b ..."""
    queries, keys, rows, again = [0], [0], [], []
    at = 0
    for prompt, a, b in pairs:
        tokens = list(range(at, at + prompt + a + b))
        again += [(t, len(rows) + prompt + a + i) for i, t in enumerate(tokens[:prompt])]
        rows += [*tokens[: prompt + a], *tokens[:prompt], *tokens[prompt + a :]]
        queries += [at + prompt + a, at + prompt + a + b]
        keys += [keys[-1] + prompt + a, keys[-1] + prompt + a + prompt + b]
        at += prompt + a + b
    first = [rows.index(t) for t in range(at)]
    shared = SharedKeys(
        torch.tensor(keys, dtype=torch.int32, device=device),
        torch.tensor(rows, device=device),
        torch.tensor(first, device=device),
        torch.tensor(again, device=device).t(),
    )
    longest = max(torch.tensor(keys).diff().tolist())
    return AttentionLayout.shared_prompts(torch.tensor(queries, dtype=torch.int32, device=device), shared, longest, at)


def inputs(
    spec: AttentionSpec, layout: AttentionLayout, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(q, k, v) as columns of one buffer, and dout, columns of a wider one."""
    widths = [n * spec.head_dim for n in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)]
    q, k, v = random(layout.tokens, sum(widths), dtype=dtype, device=device, seed=seed).split(widths, 1)
    dout = random(layout.tokens, widths[0] + 16, dtype=dtype, device=device, seed=seed + 1)[:, : widths[0]]
    return (q, k, v), dout


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


def causal_by_sequence(spec: AttentionSpec, layout: AttentionLayout) -> Callable[..., Tensor]:
    """What transformers runs on whole sequences without a mask: SDPA with `is_causal`, here one sequence at a time.

    K and V are expanded, as transformers does where SDPA takes no groups. In float32 a mask, or groups, would lead
    torch to its exact math backend, whose rounding error is half of the memory-efficient kernel's: 1.6e-5
    against 2.9e-5.
    """
    if layout.cu_seqlens is None:
        lengths = [layout.seq] * layout.batch
    else:
        lengths = layout.cu_seqlens.diff().tolist()

    def run(*qkv: Tensor) -> Tensor:
        outs = []
        for parts in zip(*(t.view(layout.tokens, -1, spec.head_dim).split(lengths) for t in qkv)):
            q, k, v = (t.transpose(0, 1)[None] for t in parts)
            k, v = (t.repeat_interleave(spec.group, 1) for t in (k, v))
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale)
            outs.append(out[0].transpose(0, 1).reshape(-1, spec.num_heads * spec.head_dim))
        return torch.cat(outs)

    return run


def check_backend(
    name: str,
    spec: AttentionSpec,
    layout_name: str,
    dtype: torch.dtype,
    device: torch.device,
    stock_of: Callable[[AttentionSpec, AttentionLayout], Callable[..., Tensor]] | None = None,
) -> None:
    accuracy = Accuracy()
    layout = make_layout(layout_name, device)
    for seed in range(3):
        tensors, dout = inputs(spec, layout, dtype, device, seed)

        def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return reference(q, k, v, spec, layout)

        (want,), wants = oracle_gradients(exact, [t.double() for t in tensors], (dout.double(),))
        stock_op = stock_attention(spec, layout, eager=name == "math") if stock_of is None else stock_of(spec, layout)
        (stock,), stocks = oracle_gradients(stock_op, tensors, (dout,))
        out, saved = attention_forward(*tensors, spec, layout, backend=name)
        accuracy.add("out", out, stock, want)
        for label, *values in zip(("dq", "dk", "dv"), attention_backward(dout, saved), stocks, wants):
            accuracy.add(label, *values)
    accuracy.check()
