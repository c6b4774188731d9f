"""The calls of GPU backends, as far as they can be checked without a GPU: torch's schemas, shapes and masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyralis.ops import attention_backends, attention_flex
from pyralis.ops._aten import AtenOp, aten
from pyralis.ops.attention import attention_backward, attention_forward, reference
from pyralis.ops.attention_parts import Saved
from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec

SPEC = AttentionSpec(8, 2, 64, 0.125)
TOKENS = 74


def layout_on(device: str, packed: bool) -> AttentionLayout:
    if not packed:
        return AttentionLayout.padded(2, 37)
    return AttentionLayout.packed(torch.tensor([0, 30, 34, TOKENS], dtype=torch.int32).to(device), 40, TOKENS)


def tensors_on(device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    fused, wide = (torch.randn(TOKENS, n, generator=generator).to(device, dtype) for n in (768, 520))
    return list(fused.split([512, 128, 128], 1)), wide[:, :512]


@pytest.mark.parametrize(
    ("backend", "packed", "window"),
    [
        ("cudnn", False, None),
        ("flash", False, None),
        ("flash", False, 8),
        ("flash", True, None),
        ("flash", True, 8),
    ],
)
def test_schemas_and_shapes(backend: str, packed: bool, window: int | None) -> None:
    """Torch's own kernels on meta tensors: every argument is checked, nothing is computed."""
    qkv, dout = tensors_on("meta", torch.bfloat16)
    out, saved = attention_forward(*qkv, replace(SPEC, window=window), layout_on("meta", packed), backend=backend)
    assert (out.shape, out.dtype) == ((TOKENS, 512), torch.bfloat16)
    for grad, t in zip(attention_backward(dout, saved), qkv):
        assert (grad.shape, grad.dtype) == (t.shape, t.dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("deterministic", [False, True])
def test_efficient(packed: bool, window: int | None, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward has no meta kernel that works, so the call is recorded."""
    seen: dict[str, Any] = {}

    def record(**arguments: Any) -> tuple[Tensor, ...]:
        seen.update(arguments)
        return *(torch.ones_like(arguments[name]) for name in ("query", "key", "value")), torch.empty(0)

    def recorded(name: str) -> AtenOp:
        return replace(aten(name), overload=record) if name.endswith("backward") else aten(name)

    monkeypatch.setattr(attention_backends, "aten", recorded)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    qkv, dout = tensors_on("meta", torch.float16)
    _, saved = attention_forward(*qkv, replace(SPEC, window=window), layout_on("meta", packed), backend="efficient")
    for grad, t in zip(attention_backward(dout, saved), qkv):
        assert grad.shape == t.shape
    assert seen["key"].shape == seen["query"].shape == ((1, TOKENS, 8, 64) if packed else (2, 37, 8, 64))
    assert seen["custom_mask_type"] == 1
    assert seen.get("window_size") == window
    assert seen.get("num_splits_key") == (1 if deterministic else None)
    assert (seen["cu_seqlens_q"] is not None) == packed


def test_cudnn_is_called_as_it_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch finds plans by q, k and v alone: `out` and `grad_out` lie as in the first call, their values unchanged."""
    seen: list[dict[str, Any]] = []

    def record(**arguments: Any) -> tuple[Tensor, ...]:
        seen.append(arguments)
        return tuple(torch.empty_like(arguments[name]) for name in ("query", "key", "value"))

    monkeypatch.setattr(attention_backends, "aten", lambda name: replace(aten(name), overload=record))
    monkeypatch.setattr(attention_backends, "_planned", {})
    (q, k, v), dout = tensors_on("cpu", torch.float32)
    wide, narrow = torch.randn(TOKENS, 576)[:, :512], torch.randn(TOKENS, 512)
    state = dict.fromkeys(("logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset"))
    for batch, out, grad in ((2, wide, dout), (2, narrow, dout), (2, wide, narrow), (1, narrow, narrow)):
        layout = AttentionLayout.padded(batch, TOKENS // batch)
        attention_backends._cudnn_backward(grad, Saved("cudnn", SPEC, layout, q, k, v, out, state))
        given = seen[-1]
        for name, t in (("out", out), ("grad_out", grad)):
            assert torch.equal(given[name].transpose(1, 2).reshape(TOKENS, 512), t)
    assert [call["out"].stride(2) for call in seen] == [576, 576, 576, 512]
    assert [call["grad_out"].stride(2) for call in seen] == [520, 520, 520, 512]
    assert seen[0]["out"].data_ptr() == wide.data_ptr()  # nothing is copied where nothing has to be


def test_gradients_of_repeated_heads_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(**arguments: Any) -> tuple[Tensor, ...]:
        return *(torch.ones_like(arguments[name]) for name in ("query", "key", "value")), torch.empty(0)

    qkv, dout = tensors_on("cpu", torch.float32)
    _, saved = attention_forward(*qkv, SPEC, layout_on("cpu", False), backend="math")
    op = aten("_efficient_attention_backward")
    monkeypatch.setattr(attention_backends, "aten", lambda name: replace(op, overload=ones))
    state = dict.fromkeys(("logsumexp", "philox_seed", "philox_offset"))
    dq, dk, dv = attention_backward(dout, replace(saved, backend="efficient", state=state))
    assert dq.unique().tolist() == [1.0]
    assert dk.unique().tolist() == dv.unique().tolist() == [4.0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (8, None), (8, 2.0)])
def test_flash_attn(packed: bool, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, played by the reference: sequences, window and softcap reach it in its own terms."""

    def run(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, **options: Any) -> Tensor:
        left, right = options.get("window_size", (-1, 0))
        assert right == 0
        spec = AttentionSpec(
            q.shape[-2], k.shape[-2], q.shape[-1], options["softmax_scale"], options["causal"],
            None if left < 0 else left + 1, options.get("softcap"),
        )  # fmt: skip
        flat = [t.reshape(TOKENS, -1) for t in (q, k, v)]
        return reference(*flat, spec, layout).view(q.shape)

    def fixed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return run(q, k, v, AttentionLayout.padded(*q.shape[:2]), **options)

    def variable(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
    ) -> Tensor:
        assert cu_q is cu_k
        assert max_q == max_k == 40
        return run(q, k, v, AttentionLayout.packed(cu_q, max_q, len(q)), **options)

    monkeypatch.setattr(attention_backends, "_flash_attn_functions", lambda: (fixed, variable))
    spec, layout = replace(SPEC, window=window, softcap=softcap), layout_on("cpu", packed)
    qkv, dout = tensors_on("cpu", torch.float64)
    results = []
    for backend in ("flash_attn", "math"):
        out, saved = attention_forward(*qkv, spec, layout, backend=backend)
        results.append((out, *attention_backward(dout, saved)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_an_op_of_another_torch_is_refused_in_words() -> None:
    op = aten("_flash_attention_forward")
    with pytest.raises(RuntimeError, match="takes no tea"):
        replace(op, required=frozenset())({"tea": 1})
    with pytest.raises(RuntimeError, match="has a new argument: query"):
        replace(op, required=frozenset({"query"}))({})
    with pytest.raises(RuntimeError, match="has no aten::_tea_forward"):
        aten("_tea_forward")


def test_flex_attention_may_be_compiled_often() -> None:
    """A process that trains two models with windows and softcaps, padded and packed, passes torch's limit of 8."""
    from torch._dynamo import config

    attention_flex._compiled()
    assert config.recompile_limit >= attention_flex.VERSIONS
