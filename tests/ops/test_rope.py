from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from pyralis.ops._rope_kernels import HeadLaunch
from pyralis.ops._triton import Gpu, kernels_on_cpu, recording
from pyralis.ops.rope import QKNorm, reference, rope, rope_backward, rope_forward, split_qkv, supported
from tests.ops.harness import Accuracy, assert_deterministic, guarded, interpreted, oracle_gradients, random

EPS = 1e-6
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")


def tables(rows: int, rotated: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, rotated] as Hugging Face makes them."""
    frequencies = 10000.0 ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def qkv(T: int, H: int, KV: int, D: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return random(T, (H + 2 * KV) * D, dtype=dtype, device=device, seed=seed)


def norms(D: int, dtype: torch.dtype, device: torch.device, unit_offset: bool, seed: int = 0) -> QKNorm:
    q, k = ((1 + random(D, dtype=torch.float32, device=device, seed=seed + i, scale=0.2)).to(dtype) for i in (30, 31))
    return QKNorm(q, k, EPS, unit_offset)


def to_double(norm: QKNorm) -> QKNorm:
    return QKNorm(norm.q_weight.double(), norm.k_weight.double(), norm.eps, norm.unit_offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [16, 12])
def test_reference_is_stock(dtype: torch.dtype, rotated: int) -> None:
    B, S, H, KV, D = 2, 5, 4, 2, 16
    q, k, _ = split_qkv(qkv(B * S, H, KV, D, dtype, CPU, 0), H, KV)
    cos, sin = tables(S, rotated, dtype, CPU)
    heads = [t.reshape(B, S, -1, D).transpose(1, 2) for t in (q, k)]
    stock = apply_rotary_pos_emb if rotated == D else apply_partial
    expected = stock(*heads, cos[None], sin[None])
    for got, want in zip(reference(q, k, cos, sin), expected):
        assert torch.equal(got.view(B, S, -1, D).transpose(1, 2), want)


def test_reference_with_norms_is_stock() -> None:
    q, k, _ = split_qkv(qkv(5, 4, 2, 16, torch.bfloat16, CPU, 0), 4, 2)
    cos, sin = tables(5, 16, torch.bfloat16, CPU)
    norm = norms(16, torch.bfloat16, CPU, unit_offset=False)
    normed = []
    for x, weight in ((q, norm.q_weight), (k, norm.k_weight)):
        module = Qwen3RMSNorm(16, eps=EPS).to(torch.bfloat16)
        module.weight.data.copy_(weight)
        normed.append(module(x).detach().transpose(0, 1)[None])
    expected = apply_rotary_pos_emb(*normed, cos[None], sin[None])
    for got, want in zip(reference(q, k, cos, sin, norm=norm), expected):
        assert torch.equal(got.transpose(0, 1)[None], want)


SHAPES = (  # T, H, KV, D, R
    (2, 4, 2, 16, 16),
    (3, 7, 1, 24, 24),
    (3, 6, 3, 20, 12),
    (2, 32, 8, 128, 128),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [None, False, True], ids=["plain", "qwen3", "gemma3"])
@pytest.mark.parametrize(("T", "H", "KV", "D", "R"), SHAPES)
def test_forward_and_backward(
    device: torch.device, T: int, H: int, KV: int, D: int, R: int, normed: bool | None, dtype: torch.dtype
) -> None:
    accuracy = Accuracy()
    for seed in range(2):
        q, k, _ = split_qkv(qkv(T, H, KV, D, dtype, device, seed), H, KV)
        dq, dk, _ = split_qkv(qkv(T, H, KV, D, dtype, device, seed + 70), H, KV)
        cos, sin = tables(50, R, dtype, device)
        positions = torch.randint(0, 50, (T,), generator=torch.Generator().manual_seed(seed)).to(device)
        norm = None if normed is None else norms(D, dtype, device, normed, seed)

        def run(q: Tensor, k: Tensor, *weights: Tensor, cos: Tensor = cos, sin: Tensor = sin, p: Tensor = positions):
            norm = QKNorm(*weights, EPS, bool(normed)) if weights else None
            return reference(q, k, cos.to(q.dtype), sin.to(q.dtype), positions=p, norm=norm)

        args = (q, k) if norm is None else (q, k, norm.q_weight, norm.k_weight)
        oracle = oracle_gradients(run, [t.double() for t in args], (dq.double(), dk.double()))
        stock = oracle_gradients(run, args, (dq, dk))
        outs = [guarded(T, h * D, dtype=dtype, device=device, stride=h * D + 5) for h in (H, KV)]
        new_q, new_k, saved = rope_forward(
            q, k, cos, sin, positions=positions, norm=norm,
            q_out=outs[0].view.unflatten(1, (H, D)), k_out=outs[1].view.unflatten(1, (KV, D)),
        )  # fmt: skip
        for out in outs:
            out.check()
        dweights = [] if norm is None else [guarded(D, dtype=dtype, device=device) for _ in range(2)]
        views = [buffer.view for buffer in dweights] or [None, None]
        rope_backward(
            dq, dk, cos, sin, positions=positions, norm=norm, saved=saved, dq_weight=views[0], dk_weight=views[1]
        )
        for buffer in dweights:
            buffer.check()
        got = (new_q, new_k, dq, dk, *(buffer.view for buffer in dweights))
        names = ("q", "k", "dq", "dk", "dq_weight", "dk_weight")
        for name, a, b, c in zip(names, got, stock[0] + stock[1], oracle[0] + oracle[1]):
            accuracy.add(name, a, b, c)
    accuracy.check()


@pytest.mark.parametrize("normed", [None, False])
@pytest.mark.parametrize("R", [16, 12])
def test_in_place_on_a_fused_row(device: torch.device, R: int, normed: bool | None) -> None:
    """v and what lies beside the row stay as they were."""
    T, H, KV, D = 4, 3, 2, 16
    buffer = guarded(T, (H + 2 * KV) * D, dtype=torch.bfloat16, device=device, stride=(H + 2 * KV) * D + 9)
    buffer.view.copy_(qkv(T, H, KV, D, torch.bfloat16, device, 0))
    q, k, v = split_qkv(buffer.view, H, KV)
    before = v.clone()
    cos, sin = tables(T, R, torch.bfloat16, device)
    norm = None if normed is None else norms(D, torch.bfloat16, device, normed)
    fresh = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k)]
    want_q, want_k, _ = rope_forward(q, k, cos, sin, norm=norm, q_out=fresh[0], k_out=fresh[1])
    got_q, got_k, _ = rope_forward(q, k, cos, sin, norm=norm, q_out=q, k_out=k)
    buffer.check()
    assert got_q is q
    assert torch.equal(got_q, want_q)
    assert torch.equal(got_k, want_k)
    assert torch.equal(v, before)


@pytest.mark.parametrize("normed", [None, False])
@pytest.mark.parametrize("R", [16, 12])
def test_backward_into_a_fused_row(device: torch.device, R: int, normed: bool | None) -> None:
    """The same bits as in place; dq and dk stay as they were, and so does what lies beside their places."""
    T, H, KV, D = 5, 3, 2, 16
    q, k, _ = split_qkv(qkv(T, H, KV, D, torch.bfloat16, device, 0), H, KV)
    dq, dk, _ = split_qkv(qkv(T, H, KV, D, torch.bfloat16, device, 1), H, KV)
    cos, sin = tables(T, R, torch.bfloat16, device)
    norm = None if normed is None else norms(D, torch.bfloat16, device, normed)
    saved = rope_forward(q, k, cos, sin, norm=norm, q_out=torch.empty_like(q), k_out=torch.empty_like(k))[2]
    before = dq.clone(), dk.clone()
    want = rope_backward(dq.clone(), dk.clone(), cos, sin, norm=norm, saved=saved)
    buffer = guarded(T, (H + 2 * KV) * D, dtype=torch.bfloat16, device=device, stride=(H + 2 * KV) * D + 9)
    to_q, to_k, to_v = split_qkv(buffer.view, H, KV)
    to_v.fill_(7.0)
    got = rope_backward(dq, dk, cos, sin, norm=norm, saved=saved, dq_out=to_q, dk_out=to_k)
    buffer.check()
    assert got[0] is to_q
    for a, b in zip((*got, dq, dk), (*want, *before)):
        assert torch.equal(a, b)
    assert bool((to_v == 7.0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [None, False])
@pytest.mark.parametrize(("T", "H", "KV", "D", "R"), [(5, 3, 2, 16, 12), (3, 7, 5, 24, 24), (2, 20, 20, 128, 128)])
def test_v_is_copied_on_the_way(
    device: torch.device, T: int, H: int, KV: int, D: int, R: int, normed: bool | None, dtype: torch.dtype
) -> None:
    """From any strides into a fused row; q's, k's and the norms' gradients are the same bits as without it. Of the last
    shape's heads one program takes sixteen, another four; five heads are fewer than a tile's eight."""
    q, k, _ = split_qkv(qkv(T, H, KV, D, dtype, device, 0), H, KV)
    dq, dk, dv = split_qkv(qkv(T, H, KV, D, dtype, device, 1), H, KV)
    cos, sin = tables(T, R, dtype, device)
    norm = None if normed is None else norms(D, dtype, device, normed)
    saved = rope_forward(q, k, cos, sin, norm=norm, q_out=torch.empty_like(q), k_out=torch.empty_like(k))[2]
    transposed = dv.transpose(0, 1).contiguous().transpose(0, 1)
    results = []
    for v in (None, dv, dv.contiguous(), transposed):
        width = (H + 2 * KV) * D
        buffer = guarded(T, width, dtype=dtype, device=device, stride=width + 9)
        weights = [None, None] if norm is None else [torch.empty_like(norm.q_weight) for _ in range(2)]
        to_q, to_k, to_v = split_qkv(buffer.view, H, KV)
        before = None if v is None else v.clone()
        rope_backward(
            dq, dk, cos, sin, norm=norm, saved=saved, dq_weight=weights[0], dk_weight=weights[1],
            dq_out=to_q, dk_out=to_k, dv=v, dv_out=None if v is None else to_v,
        )  # fmt: skip
        if v is None:
            assert bool(to_v.isnan().all())
            to_v.copy_(dv)
        else:
            assert torch.equal(v, before)
        buffer.check()
        results.append((buffer.view, *(w for w in weights if w is not None)))
    for found in results[1:]:
        for a, b in zip(found, results[0]):
            assert torch.equal(a, b)


def test_v_beside_q_and_k_in_place(device: torch.device) -> None:
    """Its place may be any, of heads that lie apart too; what cannot be copied is said."""
    T, H, KV, D = 4, 2, 3, 16
    dq, dk, dv = split_qkv(qkv(T, H, KV, D, torch.bfloat16, device, 0), H, KV)
    cos, sin = tables(T, D, torch.bfloat16, device)
    want = rope_backward(dq.clone(), dk.clone(), cos, sin)
    storage = torch.full((KV, T + 1, D + 3), 7.0, dtype=torch.bfloat16, device=device)
    place = storage[:, :T, :D].transpose(0, 1)
    got = rope_backward(dq, dk, cos, sin, dv=dv, dv_out=place)
    assert torch.equal(place, dv)
    place.fill_(7.0)
    assert bool((storage == 7.0).all())
    for a, b in zip(got, want):
        assert torch.equal(a, b)
    for wrong in (None, place[:, :1], place.float()):
        with pytest.raises(AssertionError, match="dv and dv_out"):
            rope_backward(dq, dk, cos, sin, dv=dv, dv_out=wrong)


@pytest.mark.parametrize(("heads", "D", "R"), [(8, 128, 128), (32, 80, 32), (4, 256, 256), (1, 512, 16), (71, 64, 16)])
def test_tiles_of_v_fit_into_registers(heads: int, D: int, R: int) -> None:
    plan = HeadLaunch.of(max(heads, 32), R)
    copied = plan.copied_heads(heads, D)
    assert copied & (copied - 1) == 0
    assert copied == 1 or copied * D <= 16 * 32 * plan.num_warps
    assert copied < 2 * heads


def test_one_launch_with_v_or_without() -> None:
    """v's heads are programs of the same grid."""
    T, H, KV, D = 8, 32, 8, 128
    grids = []
    for with_v in (False, True):
        with recording(Gpu((9, 0), 132)) as launches:
            q, k, v = split_qkv(torch.empty((T, (H + 2 * KV) * D), dtype=torch.bfloat16, device="meta"), H, KV)
            cos, sin = torch.empty((2, T, D), dtype=torch.bfloat16, device="meta")
            rope_backward(q, k, cos, sin, dv=v if with_v else None, dv_out=torch.empty_like(v) if with_v else None)
        (launch,) = launches
        grids.append(launch.grid)
    assert grids == [(T, 3), (T, 4)]


def test_transposed_heads_and_shared_table(device: torch.device) -> None:
    """q as [H, T, D] in memory; two sequences share one table; int32 positions say the same."""
    T, H, KV, D, S = 6, 4, 2, 16, 3
    q, k, _ = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in split_qkv(
        qkv(T, H, KV, D, torch.float32, device, 0), H, KV
    ))  # fmt: skip
    cos, sin = tables(S, D, torch.float32, device)
    want = reference(q, k, cos, sin)
    positions = torch.arange(T, dtype=torch.int32, device=device) % S
    for p in (None, positions):
        got = rope_forward(q.clone(), k.clone(), cos, sin, positions=p)
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1], want[1])


def test_backward_undoes_the_rotation(device: torch.device) -> None:
    q, k, _ = split_qkv(qkv(5, 4, 2, 32, torch.float32, device, 0), 4, 2)
    cos, sin = tables(5, 32, torch.float32, device)
    new_q, new_k, _ = rope_forward(q.clone(), k.clone(), cos, sin)
    old_q, old_k = rope_backward(new_q, new_k, cos, sin)
    torch.testing.assert_close(old_q, q)
    torch.testing.assert_close(old_k, k)


def test_deterministic(device: torch.device) -> None:
    T, H, KV, D = 9, 5, 2, 32
    q, k, _ = split_qkv(qkv(T, H, KV, D, torch.bfloat16, device, 0), H, KV)
    cos, sin = tables(T, D, torch.bfloat16, device)
    norm = norms(D, torch.bfloat16, device, False)

    def once() -> tuple[Tensor, ...]:
        new_q, new_k, saved = rope_forward(q, k, cos, sin, norm=norm)
        weights = torch.empty_like(norm.q_weight), torch.empty_like(norm.k_weight)
        grads = rope_backward(
            new_q.clone(), new_k.clone(), cos, sin, norm=norm, saved=saved, dq_weight=weights[0], dk_weight=weights[1]
        )
        return new_q, new_k, *grads, *weights

    assert_deterministic(once)


@pytest.mark.parametrize("normed", [None, True])
def test_autograd(device: torch.device, normed: bool | None) -> None:
    T, H, KV, D = 6, 4, 2, 16
    q, k, _ = split_qkv(qkv(T, H, KV, D, torch.float32, device, 0), H, KV)
    dq, dk, _ = split_qkv(qkv(T, H, KV, D, torch.float32, device, 1), H, KV)
    cos, sin = tables(T, D, torch.float32, device)

    def of(function):
        def call(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
            return function(q, k, cos, sin, norm=QKNorm(*weights, EPS, True) if weights else None)

        return call

    norm = None if normed is None else norms(D, torch.float32, device, normed)
    args = (q, k) if norm is None else (q, k, norm.q_weight, norm.k_weight)
    got = oracle_gradients(of(rope), args, (dq, dk))
    want = oracle_gradients(of(reference), args, (dq, dk))
    for a, b in zip(got[0] + got[1], want[0] + want[1]):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@interpreted
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 5), H=st.integers(1, 9), KV=st.integers(1, 4), half=st.integers(1, 20), rest=st.integers(0, 9),
    normed=st.sampled_from([None, False, True]),
)  # fmt: skip
def test_any_shape(T: int, H: int, KV: int, half: int, rest: int, normed: bool | None) -> None:
    D = 2 * half + rest
    cos, sin = tables(max(T, 1), 2 * half, torch.float32, CPU)
    norm = None if normed is None else norms(D, torch.float32, CPU, normed)
    results = []
    for enabled in (True, False):
        with kernels_on_cpu(enabled):
            q, k, v = split_qkv(qkv(T, H, KV, D, torch.float32, CPU, 0), H, KV)
            new_q, new_k, saved = rope_forward(q, k, cos, sin, norm=norm)
            to_v = torch.full_like(v, float("nan"))
            weights = [None, None] if norm is None else [torch.empty(D), torch.empty(D)]
            grads = rope_backward(
                new_q.clone(), new_k.clone(), cos, sin, norm=norm, saved=saved,
                dq_weight=weights[0], dk_weight=weights[1], dv=v, dv_out=to_v,
            )  # fmt: skip
            results.append((new_q.clone(), new_k.clone(), *grads, *(w for w in weights if w is not None), to_v))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@interpreted
def test_supported_says_why() -> None:
    q, k, _ = split_qkv(torch.zeros(2, 64), 2, 1)
    cos, sin = tables(2, 16, torch.float32, CPU)
    assert supported(q, k, cos, sin) == "kernels need a GPU"
    with kernels_on_cpu():
        assert supported(q, k, cos, sin) is None
        assert "not contiguous" in str(supported(q.transpose(1, 2), k, cos, sin))


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    T, H, KV, D = 2**18 + 3, 64, 1, 128
    row = torch.randn(T, (H + 2 * KV) * D, dtype=torch.bfloat16, device="cuda")
    cos, sin = tables(4096, D, torch.bfloat16, torch.device("cuda"))
    positions = torch.arange(T, device="cuda") % 4096
    tail = row[-5:].clone()
    rope_forward(*split_qkv(row, H, KV)[:2], cos, sin, positions=positions)
    rope_forward(*split_qkv(tail, H, KV)[:2], cos, sin, positions=positions[-5:].clone())
    assert torch.equal(row[-5:], tail)
    q, k, v = split_qkv(row, H, KV)
    dv = k.neg()
    rope_backward(q[:, :1], k, cos, sin, positions=positions, dv=dv, dv_out=v)
    assert torch.equal(v, dv)
