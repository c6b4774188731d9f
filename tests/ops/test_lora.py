from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pyralis.ops import lora
from pyralis.ops._triton import Gpu, at_least_float32, kernels_on_cpu
from pyralis.ops.dora import norms_and_ratio
from pyralis.ops.dropout_mask import new_rng
from pyralis.ops.lora import LoraGradients, lora_backward, lora_forward, lora_project
from pyralis.ops.lora_group import (
    COLUMNS,
    LoraGroup,
    LoraProjection,
    combine_bias,
    concatenates,
    stack_A,
    stack_B,
)
from pyralis.ops.lora_linear import keep_masks, lora_linear, reference
from tests.ops.harness import Accuracy, Guarded, assert_deterministic, guarded, interpreted, oracle_gradients, random

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STREAM = 5
QKV = LoraGroup(72, (LoraProjection(61, 3, 1.7), LoraProjection(20, 3, 1.7), LoraProjection(20, 3, 1.7)))
GROUPS = {
    "q k v": QKV,
    "dropout": LoraGroup(72, tuple(replace(p, dropout=0.1) for p in QKV.projections)),
    "one": LoraGroup(136, (LoraProjection(50, 16, 0.25),)),
    "subset": LoraGroup(40, (LoraProjection(24, 1, 2.0, 0.2), LoraProjection(9), LoraProjection(33, 16, 0.5))),
    "rank 64": LoraGroup(80, (LoraProjection(48, 64, 1.0, 0.5),)),
    "none": LoraGroup(40, (LoraProjection(24), LoraProjection(17))),
    "dora": LoraGroup(72, (LoraProjection(30, 4, 1.5), LoraProjection(21)), dora=True),
    "dora with dropout": LoraGroup(
        72, (LoraProjection(30, 4, 1.5, 0.1), LoraProjection(21), LoraProjection(8, 2, 1.0, 0.3)), dora=True
    ),
}
Parameters = list[list[Tensor | None]]  # A, B, bias, lora_bias, magnitude: one of each for each projection


def make(group: LoraGroup, T: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """(x, weight, dy)"""
    K, N = group.in_features, group.out_features
    x = random(T, K, dtype=dtype, device=device, seed=seed)
    weight = random(N, K, dtype=dtype, device=device, seed=seed + 1, scale=K**-0.5)
    return x, weight, random(T, N, dtype=dtype, device=device, seed=seed + 2)


def make_parameters(group: LoraGroup, dtype: torch.dtype, device: torch.device, seed: int) -> Parameters:
    found: Parameters = [[], [], [], [], []]
    for j, p in enumerate(group.projections):

        def values(*shape: int, scale: float, kind: int, j: int = j) -> Tensor:
            return random(*shape, dtype=dtype, device=device, seed=seed + 10 * kind + j, scale=scale)

        adapter = p.rank > 0
        found[0].append(values(p.rank, group.in_features, scale=group.in_features**-0.5, kind=1) if adapter else None)
        found[1].append(values(p.out_features, p.rank, scale=p.rank**-0.5, kind=2) if adapter else None)
        found[2].append(values(p.out_features, scale=0.5, kind=3) if j != 1 else None)
        found[3].append(values(p.out_features, scale=0.5, kind=4) if adapter and not group.dora else None)
        found[4].append(1 + values(p.out_features, scale=0.2, kind=5).abs() if adapter and group.dora else None)
    return found


def flat(parameters: Parameters) -> list[Tensor]:
    return [p for kind in parameters for p in kind if p is not None]


def unflat(parameters: Parameters, values: list[Tensor]) -> Parameters:
    left = iter(values)
    return [[None if p is None else next(left) for p in kind] for kind in parameters]


def options(group: LoraGroup, parameters: Parameters) -> dict[str, list[Tensor | None] | None]:
    """The keyword arguments of `reference` and `lora_linear`."""
    _, _, bias, lora_bias, magnitude = parameters
    return {
        "bias": bias,
        "lora_bias": None if group.dora else lora_bias,
        "magnitude": magnitude if group.dora else None,
    }


Layout = tuple[bool, bool]  # room for the B_j beside W, for the A_j below it
LAYOUTS: list[Layout] = [(False, False), (True, False), (False, True), (True, True)]


def placed(group: LoraGroup, weight: Tensor, layout: Layout = (True, True)) -> Tensor:
    """W with room for an adapter, poisoned."""
    beside, below = layout
    height, width = (group.height if below else len(weight)), (group.width if beside else weight.shape[1])
    matrix = weight.new_full((height, width), float("nan"))
    matrix[: len(weight), : weight.shape[1]] = weight
    return matrix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [(False, False), (True, True)])
@pytest.mark.parametrize("name", GROUPS)
def test_every_gradient(device: torch.device, name: str, layout: Layout, dtype: torch.dtype) -> None:
    """y and the gradients of x and every parameter against float64, beside PEFT's arithmetic in the same dtype."""
    group, T, accuracy = GROUPS[name], 37, Accuracy()
    for seed in (0, 100, 200):
        x, weight, dy = make(group, T, dtype, device, seed)
        parameters = make_parameters(group, dtype, device, seed)
        rng = new_rng(seed, device) if group.has_dropout else None
        masks = None if rng is None else keep_masks(group, rng, STREAM, T)

        def by_peft(x: Tensor, *values: Tensor, w: Tensor, p: Parameters = parameters, masks=masks) -> Tensor:
            p = unflat(p, list(values))
            return reference(x, w, group, p[0], p[1], **options(group, p), masks=masks)

        def by_us(x: Tensor, *values: Tensor, p: Parameters = parameters, weight=weight, rng=rng) -> Tensor:
            p = unflat(p, list(values))
            w = placed(group, weight, layout)
            return lora_linear(x, w, group, p[0], p[1], **options(group, p), rng=rng, stream=STREAM)

        values = [x, *flat(parameters)]
        exact = [v.double() for v in values]
        oracle_y, oracle = oracle_gradients(lambda *v, w=weight: by_peft(*v, w=w.double()), exact, (dy.double(),))
        stock_y, stock = oracle_gradients(lambda *v, w=weight: by_peft(*v, w=w), values, (dy,))
        masters = [x, *(v.float() for v in values[1:])]
        y, ours = oracle_gradients(by_us, masters, (dy,))
        assert all(g.dtype == torch.float32 for g in ours[1:])
        results = zip((*y, *ours), (*stock_y, *stock), (*oracle_y, *oracle))
        for i, (a, b, c) in enumerate(results):
            if dtype == torch.float32:  # as near as a sum's order lets it be: stock's own error says nothing
                assert float((a - c).abs().max()) <= 2e-6 * float(c.abs().max())
            else:
                accuracy.add(f"{'y' if i == 0 else f'gradient {i}'} {list(c.shape)}", a, b, c)
    if dtype != torch.float32:
        accuracy.check()


@pytest.mark.parametrize("adds_in_gemm", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GROUPS)
def test_exact_in_float64(name: str, layout: Layout, adds_in_gemm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch path in float64 is the reference's derivative to the last digits."""
    monkeypatch.setattr(lora, "ADDS_IN_GEMM", adds_in_gemm)
    group, T, device = GROUPS[name], 9, torch.device("cpu")
    x, weight, dy = make(group, T, torch.float64, device, 0)
    parameters = make_parameters(group, torch.float64, device, 0)
    rng = new_rng(3, device)
    masks = keep_masks(group, rng, STREAM, T)
    shape = (3, 3, group.in_features)

    def run(x: Tensor, *values: Tensor, ours: bool) -> Tensor:
        p = unflat(parameters, list(values))
        if not ours:
            return reference(x, weight, group, p[0], p[1], **options(group, p), masks=masks)
        w = placed(group, weight, layout)
        return lora_linear(x, w, group, p[0], p[1], **options(group, p), rng=rng, stream=STREAM)

    values, grads = (x.view(shape), *flat(parameters)), (dy.view(*shape[:2], -1),)
    got = oracle_gradients(lambda *v: run(*v, ours=True), values, grads)
    want = oracle_gradients(lambda *v: run(*v, ours=False), values, grads)
    for a, b in zip(got[0] + got[1], want[0] + want[1]):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert rng.tolist() == [3, 1 if group.has_dropout else 0]


@pytest.mark.parametrize(("dora", "lora_bias"), [(False, False), (False, True), (True, False)])
def test_reference_is_peft(dora: bool, lora_bias: bool) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(24, 17)),
        LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=dora, lora_bias=lora_bias, lora_dropout=0.0),
    )
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(B)
    bias = layer.lora_B["default"].bias
    if bias is not None:
        nn.init.normal_(bias)
    magnitude = None
    if dora:
        magnitude = layer.lora_magnitude_vector["default"].weight
        with torch.no_grad():
            magnitude *= 1.1
    group = LoraGroup(24, (LoraProjection(17, 4, 1.5),), dora=dora)
    x = torch.randn(2, 5, 24)
    arguments = {
        "bias": [layer.base_layer.bias],
        "lora_bias": None if dora else [bias],
        "magnitude": [magnitude] if dora else None,
    }
    expected = model(x)
    weight = layer.base_layer.weight
    torch.testing.assert_close(reference(x, weight, group, [A], [B], **arguments), expected, rtol=1e-6, atol=1e-6)
    got = lora_linear(x, weight.detach(), group, [A], [B], **arguments)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
    trained = [p for p in (A, B, bias, magnitude) if p is not None]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), trained), torch.autograd.grad(expected.square().sum(), trained)
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dropout", "q k v", "one"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_primitives_write_into_buffers(device: torch.device, layout: Layout, name: str) -> None:
    """What a layer does: guarded, poisoned buffers, a residual, the bias of both kinds, accumulated gradients."""
    group, T, dtype = GROUPS[name], 11, torch.bfloat16
    K, N, P = group.in_features, group.out_features, group.pad
    beside, below = layout
    x, weight, dy = make(group, T, dtype, device, 0)
    A, B, bias, lora_bias, _ = make_parameters(group, torch.float32, device, 0)
    residual = random(T, N, dtype=dtype, device=device, seed=9)
    rng = new_rng(0, device) if group.has_dropout else None

    def buffer(rows: int, columns: int, gap: int = 8) -> Guarded:
        return guarded(rows, columns, dtype=dtype, device=device, stride=columns + gap)

    stacked = buffer(P, K, 0)
    stack_A(group, A, stacked.view)
    stacked.check()
    matrix = buffer(N + P if below else N, K + P if beside else K)
    w = matrix.view
    w[:N, :K] = weight
    if beside:
        stack_B(group, B, w[:N, K:])
    if below:
        w[N:, :K] = stacked.view
    cast = None if beside else [None if b is None else b.to(dtype) for b in B]
    x_wide = buffer(T, K + P)
    x_wide.view[:, :K] = x
    xa = lora_project(group, x_wide.view, stacked.view, rng=rng, stream=STREAM)
    x_wide.check()
    assert not xa[:, group.rank :].any()

    total = combine_bias(group, bias, lora_bias, dtype)
    out = buffer(T, N, 3)
    lora_forward(group, x_wide.view, w, B=cast, bias=total, residual=residual, out=out.view)
    out.check()
    masks = None if rng is None else keep_masks(group, rng, STREAM, T)
    double = [[None if p is None else p.double() for p in kind] for kind in (A, B, bias, lora_bias)]
    exact = reference(
        x.double(), weight.double(), group, double[0], double[1], bias=double[2], lora_bias=double[3], masks=masks
    )
    torch.testing.assert_close(out.view.double(), exact + residual.double(), rtol=2e-2, atol=3e-2)
    in_place = residual.clone()
    lora_forward(group, x_wide.view, w, B=cast, bias=total, residual=in_place, out=in_place)
    assert torch.equal(in_place, out.view)

    buffers = [guarded(group.rank, K, dtype=torch.float32, device=device)]
    buffers += [guarded(p.out_features, p.rank, dtype=torch.float32, device=device) for p in group.projections]
    buffers += [guarded(N, dtype=torch.float32, device=device)]
    gradients = LoraGradients(buffers[0].view, [b.view for b in buffers[1:-1]], buffers[-1].view)
    dx, dy_wide = buffer(T, K), buffer(T, N + P)
    room = dy_wide.view[:, N:] if below and rng is None else buffer(T, P).view
    arguments = {"B": cast, "rng": rng, "stream": STREAM, "t": room}
    if below and rng is None:
        arguments["dy_wide"] = dy_wide.view
    lora_backward(group, dy, w, x, xa, stacked.view, gradients, dx=dx.view, **arguments)
    for written in (*buffers, dx):
        written.check()
    assert not room[:, group.rank :].any()
    assert not room[:, : group.rank].isnan().any()
    if below and rng is None:
        dy_wide.check()
        assert torch.equal(dy_wide.view[:, :N], dy)
    once, kept = [b.view.clone() for b in buffers], dx.view.clone()
    again = {**arguments, "dy_wide": dy_wide.view} if below else arguments
    dy_given = dy_wide.view[:, :N] if below and rng is None else dy  # where it lies already, it is not copied
    lora_backward(
        group, dy_given, w, x, xa, stacked.view, replace(gradients, accumulate=True), dx=dx.view, **again
    )  # fmt: skip
    assert torch.equal(dx.view, kept)
    for a, b in zip(once, buffers):
        torch.testing.assert_close(b.view, 2 * a, rtol=1e-4, atol=1e-4)
    alone = lora_backward(group, dy, w, x, xa, stacked.view, LoraGradients(), B=cast, rng=rng, stream=STREAM)
    torch.testing.assert_close(alone, kept, rtol=2e-2, atol=2e-2)  # without dB, dy B is another product's


def test_a_frozen_projection_gets_no_gradient(device: torch.device) -> None:
    group = GROUPS["q k v"]
    x, weight, dy = make(group, 5, torch.float32, device, 0)
    A, B, *_ = make_parameters(group, torch.float32, device, 0)
    assert B[1] is not None
    B[1].requires_grad_()
    y = lora_linear(x, weight, group, A, B)
    y.backward(dy)
    assert B[1].grad is not None
    assert B[0] is not None
    assert B[0].grad is None
    assert x.grad is None


def test_two_calls_with_one_wide_weight(device: torch.device) -> None:
    """Another adapter in the shared rows and columns does not reach the first call's backward."""
    group = GROUPS["one"]
    x, weight, dy = make(group, 6, torch.float32, device, 0)
    shared, sets = placed(group, weight), [make_parameters(group, torch.float32, device, seed) for seed in (0, 1)]
    xs = [x.clone().requires_grad_() for _ in sets]
    ys = [lora_linear(v, shared, group, p[0], p[1]) for v, p in zip(xs, sets)]
    for v, y, p in zip(xs, ys, sets):
        want = oracle_gradients(lambda v, p=p: reference(v, weight, group, p[0], p[1]), (x,), (dy,))[1]
        torch.testing.assert_close(torch.autograd.grad(y, v, dy), want, rtol=1e-4, atol=1e-4)


def test_dropout_is_off_without_rng_and_new_at_each_call(device: torch.device) -> None:
    group = GROUPS["dropout"]
    x, weight, _ = make(group, 8, torch.float32, device, 0)
    A, B, *_ = make_parameters(group, torch.float32, device, 0)
    torch.testing.assert_close(
        lora_linear(x, weight, group, A, B), reference(x, weight, group, A, B), rtol=1e-5, atol=1e-5
    )
    rng = new_rng(0, device)
    first, second = (lora_linear(x, weight, group, A, B, rng=rng) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, lora_linear(x, weight, group, A, B, rng=new_rng(0, device)))


def test_deterministic(device: torch.device) -> None:
    group = GROUPS["dropout"]
    x, weight, dy = make(group, 33, torch.bfloat16, device, 0)
    parameters = make_parameters(group, torch.float32, device, 0)[:2]

    def run() -> tuple[Tensor, ...]:
        def call(x: Tensor, *values: Tensor) -> Tensor:
            A, B = unflat(parameters, list(values))
            return lora_linear(x, placed(group, weight), group, A, B, rng=new_rng(4, device))

        outputs, gradients = oracle_gradients(call, (x, *flat(parameters)), (dy,))
        return outputs + gradients

    assert_deterministic(run)


@interpreted
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_group(data: st.DataObject) -> None:
    """Kernels against the torch path, over groups of any make."""
    projection = st.builds(
        LoraProjection, st.integers(1, 20), st.sampled_from([0, 1, 5]), st.just(0.7), st.sampled_from([0.0, 0.3])
    )
    projections = tuple(data.draw(st.lists(projection, min_size=1, max_size=4)))
    group = LoraGroup(data.draw(st.integers(1, 40)), projections, dora=data.draw(st.booleans()))
    T, device, results = data.draw(st.integers(1, 20)), torch.device("cpu"), []
    x, weight, dy = make(group, T, torch.float32, device, 0)
    parameters = make_parameters(group, torch.float32, device, 0)
    for enabled in (True, False):
        with kernels_on_cpu(enabled):

            def call(x: Tensor, *values: Tensor) -> Tensor:
                p = unflat(parameters, list(values))
                w = placed(group, weight)
                return lora_linear(x, w, group, p[0], p[1], **options(group, p), rng=new_rng(2, device))

            outputs, gradients = oracle_gradients(call, (x, *flat(parameters)), (dy,))
            results.append(outputs + gradients)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_norms_and_ratio(device: torch.device, dtype: torch.dtype) -> None:
    """Against W + s B A as it stands, of what the factors are in their dtype; also where much of W is taken away."""
    group = GROUPS["dora"]
    _, weight, _ = make(group, 1, dtype, device, 0)
    A, B, _, _, magnitude = make_parameters(group, dtype, device, 0)
    assert A[0] is not None
    assert B[0] is not None
    assert magnitude[0] is not None
    stacked = stack_A(group, A, torch.empty(group.pad, group.in_features, dtype=dtype, device=device))
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for taken in (0.0, 0.7):
        weight[:30] -= (taken * 1.5 * B[0].double() @ A[0].double()).to(dtype)
        expected = torch.ones(group.out_features, dtype=torch.float64, device=device)
        expected[:30] = (weight[:30].double() + 1.5 * B[0].double() @ A[0].double()).norm(dim=1)
        wide = at_least_float32(dtype)
        buffers = [guarded(51, dtype=wide, device=device) for _ in range(2)]
        for buffer in buffers:
            buffer.view[30:] = 1  # of the projection without adapter: left as it is
        places = {"norm": buffers[0].view, "ratio": buffers[1].view}
        norm, ratio = norms_and_ratio(group, weight, stacked, magnitude, B, **places)
        for buffer in buffers:
            buffer.check()
        torch.testing.assert_close(norm.double(), expected, rtol=tolerance, atol=0)
        expected[:30] = magnitude[0].double() / expected[:30]
        torch.testing.assert_close(ratio.double(), expected, rtol=tolerance, atol=0)


def test_layout() -> None:
    group = GROUPS["subset"]
    assert group.columns == (slice(0, 1), slice(1, 1), slice(1, 17))
    assert group.rows == (slice(0, 24), slice(24, 33), slice(33, 66))
    assert (group.rank, group.pad, group.width) == (17, 24, 64)
    assert [(r.first, r.count, r.columns) for r in group.runs] == [(0, 1, slice(0, 1)), (1, 1, slice(1, 17))]
    assert [(r.first, r.count, r.columns) for r in QKV.runs] == [(0, 3, slice(0, 9))]
    assert GROUPS["none"].pad == 0
    assert LoraGroup(4096, (LoraProjection(4096, 16),)).pad == COLUMNS
    gate_up = LoraGroup(4096, (LoraProjection(14336, 64),) * 2)
    assert gate_up.pad == 2 * COLUMNS
    half = LoraProjection(1, 1, 1.0, 0.5)
    assert (half.threshold, half.keep_scale) == (32768, 2.0)
    assert math.isclose(LoraProjection(1, 1, 1.0, 0.1).keep_scale, 1 / 0.9, rel_tol=1e-5)


def test_concatenation_is_chosen_by_rank_and_gpu() -> None:
    def qkv(rank: int) -> LoraGroup:
        return LoraGroup(4096, tuple(LoraProjection(n, rank) for n in (4096, 1024, 1024)))

    h100, a100, pascal = Gpu((9, 0), 132), Gpu((8, 0), 108), Gpu((6, 1), 28)
    assert concatenates(qkv(16), 4096, h100)
    assert concatenates(qkv(64), 4096, h100)
    assert not concatenates(qkv(256), 16384, a100)
    assert not concatenates(qkv(64), 16384, pascal)
    assert not concatenates(GROUPS["none"], 4096, h100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 4), "out_features"), ((8, 257), "0..256"), ((8, -1), "0..256"), ((8, 4, 1.0, 1.0), r"\[0, 1\)")],
)
def test_impossible_projections(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraProjection(*arguments)


def test_shapes_that_contradict_the_group() -> None:
    group = GROUPS["one"]
    x, weight, _ = make(group, 2, torch.float32, torch.device("cpu"), 0)
    A, B, *_ = make_parameters(group, torch.float32, torch.device("cpu"), 0)
    with pytest.raises(ValueError, match="LoRA columns"):
        lora_linear(x, weight[:, 1:], group, A, B)
    with pytest.raises(ValueError, match="its rank 16"):
        lora_linear(x, weight, group, B, A)
    with pytest.raises(ValueError, match="frozen"):
        lora_linear(x, weight.requires_grad_(), group, A, B)
    with pytest.raises(ValueError, match="magnitude"):
        lora_linear(x, weight.detach(), group, A, B, magnitude=[None])


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """Forward and backward captured; a replay draws new masks, and the backward the forward's."""
    device, group = torch.device("cuda"), GROUPS["dropout"]
    x, weight, dy = make(group, 64, torch.bfloat16, device, 0)
    A, B, *_ = make_parameters(group, torch.float32, device, 0)
    leaf, rng, w = x.clone().requires_grad_(), new_rng(1, device), placed(group, weight)

    def step() -> tuple[Tensor, Tensor]:
        y = lora_linear(leaf, w, group, A, B, rng=rng, stream=STREAM)
        return y, torch.autograd.grad(y, leaf, dy)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        draw = rng.clone()
        graph.replay()
        got, draw_after = [t.clone() for t in captured], rng.clone()
        rng.copy_(draw)
        for a, b in zip(got, step()):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
        assert torch.equal(rng, draw_after)
