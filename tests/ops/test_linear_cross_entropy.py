from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyralis.errors import PyralisError
from pyralis.ops._loss import IGNORE_INDEX, PLAIN, LossSettings
from pyralis.ops._triton import at_least_float32, kernels_on_cpu
from pyralis.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
    reference,
    supported,
)
from tests.ops.harness import Accuracy, assert_deterministic, interpreted, oracle_gradients, random

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL_AT_ONCE = LossSettings(softcap=5.0, logit_scale=0.7, label_smoothing=0.1, z_loss=1e-2)
ALL = (True, True, True)


def inputs(
    T: int, H: int, V: int, dtype: torch.dtype, device: torch.device, seed: int, ignored: float = 0.4
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, bias, labels of which about `ignored` are -100)"""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (T,), generator=generator)
    labels[torch.rand(T, generator=generator) < ignored] = IGNORE_INDEX
    return (
        random(T, H, dtype=dtype, device=device, seed=seed),
        random(V, H, dtype=dtype, device=device, seed=seed + 100, scale=2 * H**-0.5),
        random(V, dtype=dtype, device=device, seed=seed + 200),
        labels.to(device),
    )


def stock(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossSettings, items: float | None
) -> Tensor:
    """As transformers does it: all logits in the compute dtype, then float32."""
    logits = F.linear(hidden, weight, bias) * options.logit_scale
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    z = logits.to(at_least_float32(logits.dtype))
    loss = F.cross_entropy(z, labels, reduction="sum", label_smoothing=options.label_smoothing)
    kept = labels != IGNORE_INDEX
    loss = loss + options.z_loss * (z.logsumexp(-1).square() * kept).sum()
    return loss / (kept.sum() if items is None else items)


def ours(labels: Tensor, options: LossSettings, **arguments: object) -> Callable[..., Tensor]:
    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, labels, bias=bias, softcap=options.softcap, logit_scale=options.logit_scale,
            label_smoothing=options.label_smoothing, z_loss=options.z_loss, **arguments,  # type: ignore[arg-type]
        )  # fmt: skip

    return run


@pytest.mark.parametrize("options", [PLAIN, ALL_AT_ONCE])
def test_reference_is_stock_and_the_chunked_cpu_path_equals_it(options: LossSettings) -> None:
    """Float64 throughout: loss and gradients of the path without kernels, in five chunks."""
    hidden, weight, bias, labels = inputs(11, 16, 37, torch.float64, CPU, 0)
    one = torch.ones(())
    want = oracle_gradients(lambda h, w, b: stock(h, w, b, labels, options, None), (hidden, weight, bias), (one,))
    for function in (
        lambda h, w, b: reference(h, w, labels, b, options),
        ours(labels, options, chunk_bytes=64 * 8 * 2),
        ours(labels, options),
    ):
        got = oracle_gradients(function, (hidden, weight, bias), (one,))
        for a, b in zip(got[0] + got[1], want[0] + want[1]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [PLAIN, ALL_AT_ONCE])
@pytest.mark.parametrize(
    ("T", "H", "V", "step"), [(29, 40, 200, 5), (29, 40, 203, 29), (3, 16, 3203, 2), (1, 8, 50, 9)]
)
def test_loss_and_gradients(
    device: torch.device, T: int, H: int, V: int, step: int, options: LossSettings, dtype: torch.dtype
) -> None:
    accuracy = Accuracy()
    losses = []
    for seed in range(3):
        hidden, weight, bias, labels = inputs(T, H, V, dtype, device, seed, ignored=0.4 if T > 3 else 0.0)
        given = (hidden, weight, bias)
        grad = torch.tensor(1024.0, device=device)  # a loss scale
        chunk_bytes = step * (V + 63) // 64 * 64 * dtype.itemsize
        oracle = oracle_gradients(
            lambda h, w, b, y=labels: stock(h, w, b, y, options, None), tuple(t.double() for t in given), (grad,)
        )
        usual = oracle_gradients(lambda h, w, b, y=labels: stock(h, w, b, y, options, None), given, (grad,))
        got = oracle_gradients(ours(labels, options, chunk_bytes=chunk_bytes), given, (grad,))
        losses.append((got[0][0], usual[0][0], oracle[0][0]))
        for name, *grads in zip(("dhidden", "dweight", "dbias"), got[1], usual[1], oracle[1]):
            accuracy.add(name, *grads)
    accuracy.check()
    # a single number, whose root mean square over three seeds would say little: the largest error, with slack
    ours_by, stock_by = (max(abs(float(row[i] - row[2])) for row in losses) for i in (0, 1))
    assert ours_by <= 3 * stock_by + torch.finfo(dtype).eps / 16 * float(losses[0][2])
    assert losses[0][0].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_bytes", [None, 4096])
def test_rows_left_out_change_nothing(device: torch.device, chunk_bytes: int | None, dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = inputs(150, 24, 70, dtype, device, 0, ignored=0.8)
    count = int((labels != IGNORE_INDEX).sum())
    grad = torch.tensor(8.0, device=device)
    given = (hidden.view(3, 50, 24), weight, bias)
    results = [
        oracle_gradients(ours(labels.view(3, 50), PLAIN, supervised_rows=rows, chunk_bytes=chunk_bytes), given, (grad,))
        for rows in (None, count)
    ]
    (loss_all, (dhidden_all, dweight_all, dbias_all)), (loss, (dhidden, dweight, dbias)) = results
    torch.testing.assert_close(loss[0], loss_all[0], rtol=1e-6, atol=0)
    assert dhidden.shape == given[0].shape
    assert not dhidden.view(150, 24)[labels == IGNORE_INDEX].any()
    torch.testing.assert_close(dhidden, dhidden_all)
    for a, b in ((dweight, dweight_all), (dbias, dbias_all)):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(dtype).eps * float(b.abs().max()))


def test_too_few_rows_told_is_nan(device: torch.device) -> None:
    hidden, weight, _, labels = inputs(150, 8, 20, torch.float32, device, 0, ignored=0.0)
    for told, right in ((100, False), (140, True)):
        loss, (dhidden, _) = oracle_gradients(
            ours(labels, PLAIN, supervised_rows=told), (hidden, weight), (torch.ones((), device=device),)
        )
        assert bool(loss[0].isfinite()) is right
        assert bool(dhidden.isfinite().all()) is right


@pytest.mark.parametrize("supervised_rows", [None, 0])
def test_nothing_to_learn_is_zero(device: torch.device, supervised_rows: int | None) -> None:
    hidden, weight, bias, labels = inputs(5, 8, 20, torch.bfloat16, device, 0, ignored=1.1)
    function = ours(labels, ALL_AT_ONCE, supervised_rows=supervised_rows)
    loss, grads = oracle_gradients(function, (hidden, weight, bias), (torch.ones((), device=device),))
    assert loss[0] == 0
    for grad in grads:
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_and_splits(device: torch.device, as_tensor: bool) -> None:
    """Accumulation: parts over the whole batch's number add up to the whole."""
    hidden, weight, _, labels = inputs(24, 16, 50, torch.float32, device, 0)
    items = int((labels != IGNORE_INDEX).sum())
    given = torch.tensor(items, device=device) if as_tensor else items
    one = torch.ones((), device=device)
    whole = oracle_gradients(ours(labels, PLAIN), (hidden, weight), (one,))
    cuts = (slice(0, 5), slice(5, 6), slice(6, 24))
    parts = [oracle_gradients(ours(labels[c], PLAIN, num_items=given), (hidden[c], weight), (one,)) for c in cuts]
    torch.testing.assert_close(sum(p[0][0] for p in parts), whole[0][0])
    torch.testing.assert_close(torch.cat([p[1][0] for p in parts]), whole[1][0])
    torch.testing.assert_close(sum(p[1][1] for p in parts), whole[1][1])


def test_float16_gradients_of_a_large_batch_do_not_flush(device: torch.device) -> None:
    """8192 items and no loss scale yet: stock's dlogits of about 1e-7 have hardly a digit left, ours have all.

    The upstream gradient of 65536 arrives in the backward for both.
    """
    hidden, weight, _, labels = inputs(16, 32, 300, torch.float16, device, 0, ignored=0.0)
    function = ours(labels, PLAIN, num_items=8192)
    scale = torch.tensor(65536.0, device=device)
    doubles = (hidden.double(), weight.double())
    exact = oracle_gradients(lambda h, w: stock(h, w, None, labels, PLAIN, 8192), doubles, (scale,))[1]
    got = oracle_gradients(function, (hidden, weight), (scale,))[1]
    usual = oracle_gradients(lambda h, w: stock(h, w, None, labels, PLAIN, 8192), (hidden, weight), (scale,))[1]
    accuracy = Accuracy()
    for name, *grads in zip(("dhidden", "dweight"), got, usual, exact):
        accuracy.add(name, *grads)
    accuracy.check()
    result = linear_cross_entropy_forward(hidden, weight, labels, num_items=8192)
    assert result.dhidden is not None
    assert result.unscale == 2.0**-22  # 8192 = 0.5 * 2^14, times 256
    assert (result.dhidden.abs() > 2.0**-14).float().mean() > 0.99  # normal numbers
    small = linear_cross_entropy_backward(result, torch.ones((), device=device), torch.float32)[0]
    assert small is not None
    torch.testing.assert_close(small.double(), exact[0] / 65536, rtol=5e-3, atol=1e-7)


def test_frozen_head_and_no_grad(device: torch.device) -> None:
    hidden, weight, bias, labels = inputs(9, 16, 40, torch.float32, device, 0)
    everything = oracle_gradients(ours(labels, PLAIN), (hidden, weight, bias), (torch.ones((), device=device),))
    leaf = hidden.clone().requires_grad_()
    loss = ours(labels, PLAIN)(leaf, weight, bias)
    loss.backward()
    assert torch.equal(leaf.grad, everything[1][0])  # type: ignore[arg-type]
    trained = weight.clone().requires_grad_()
    ours(labels, PLAIN)(hidden, trained, bias).backward()
    assert torch.equal(trained.grad, everything[1][1])  # type: ignore[arg-type]
    with torch.no_grad():
        alone = ours(labels, PLAIN)(leaf, trained, bias)
    assert not alone.requires_grad
    assert torch.equal(alone, loss)
    assert torch.equal(hidden, leaf)  # inputs are left alone


def test_tied_weights(device: torch.device) -> None:
    """The table is the embedding and the head: both gradients arrive in one tensor."""
    _, weight, _, labels = inputs(9, 16, 40, torch.float32, device, 0)
    tokens = labels.clamp(min=0)
    grad = (torch.ones((), device=device),)
    got = oracle_gradients(lambda w: ours(labels, PLAIN)(F.embedding(tokens, w), w), (weight,), grad)
    want = oracle_gradients(lambda w: stock(F.embedding(tokens, w), w, None, labels, PLAIN, None), (weight,), grad)
    torch.testing.assert_close(got[1][0], want[1][0], rtol=1e-5, atol=1e-6)


def test_backward_twice(device: torch.device) -> None:
    hidden, weight, _, labels = inputs(9, 16, 40, torch.bfloat16, device, 0)
    leaf = hidden.requires_grad_()
    loss = ours(labels, PLAIN)(leaf, weight)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_trained_heads_gradient_is_handed_out_once(device: torch.device) -> None:
    hidden, weight, _, labels = inputs(9, 16, 40, torch.bfloat16, device, 0)
    leaf = weight.requires_grad_()
    loss = ours(labels, PLAIN)(hidden, leaf)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    with pytest.raises(PyralisError, match="second backward"):
        torch.autograd.grad(loss, leaf)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_one_chunk_and_many_agree(device: torch.device, upstream: float, dtype: torch.dtype) -> None:
    """A weight's gradient in its own dtype, scaled in place, against float32 sums over chunks."""
    hidden, weight, _, labels = inputs(9, 16, 70, dtype, device, 0)
    grad = (torch.tensor(upstream, device=device),)
    (whole,) = oracle_gradients(lambda w: ours(labels, PLAIN)(hidden, w), (weight,), grad)[1]
    (summed,) = oracle_gradients(lambda w: ours(labels, PLAIN, chunk_bytes=600)(hidden, w), (weight,), grad)[1]
    assert whole.dtype == summed.dtype == dtype
    tolerance = 2 * torch.finfo(dtype).eps  # rounded once, and once more when it is scaled
    torch.testing.assert_close(whole, summed, rtol=tolerance, atol=tolerance * float(summed.abs().max()))


def test_under_autocast_the_dtype_is_that_of_the_inputs(device: torch.device) -> None:
    hidden, weight, _, labels = inputs(9, 16, 40, torch.float32, device, 0)
    with torch.autocast(device.type, torch.bfloat16):
        inside = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(inside, linear_cross_entropy(hidden, weight, labels))


def test_deterministic(device: torch.device) -> None:
    hidden, weight, bias, labels = inputs(150, 24, 300, torch.bfloat16, device, 0, ignored=0.6)

    def run() -> tuple[Tensor, ...]:
        result = linear_cross_entropy_forward(
            hidden, weight, labels, bias=bias, supervised_rows=100, chunk_bytes=1 << 14, needs=ALL
        )
        grads = linear_cross_entropy_backward(result, torch.ones((), device=device), torch.bfloat16)
        return (result.loss.reshape(1), *(g for g in grads if g is not None))

    assert_deterministic(run)


@interpreted
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 150), H=st.integers(1, 20), V=st.integers(2, 200), rows=st.booleans(),
    step=st.integers(1, 60), dtype=st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def test_any_shape(T: int, H: int, V: int, rows: bool, step: int, dtype: torch.dtype) -> None:
    """Kernels against the references, on the CPU."""
    hidden, weight, bias, labels = inputs(T, H, V, dtype, CPU, 0, ignored=0.9)
    results = []
    for enabled in (True, False):
        with kernels_on_cpu(enabled):
            result = linear_cross_entropy_forward(
                hidden, weight, labels, bias=bias, settings=ALL_AT_ONCE, chunk_bytes=step * 256 * dtype.itemsize,
                supervised_rows=int((labels != IGNORE_INDEX).sum()) if rows else None, needs=ALL,
            )  # fmt: skip
            results.append((result.loss, *linear_cross_entropy_backward(result, torch.ones(()), torch.float32)))
    for a, b in zip(*results):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 5e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"weight": torch.zeros(7, 5)}, "hidden"),
        ({"weight": torch.zeros(7, 4).half()}, "float16"),
        ({"bias": torch.zeros(6)}, "bias"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels"),
        ({"labels": torch.zeros(2, dtype=torch.int32)}, "int64"),
    ],
)
def test_bad_input(wrong: dict[str, Tensor], says: str) -> None:
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(7, 4), "labels": torch.zeros(2).long(), **wrong}
    with pytest.raises(ValueError, match=says):
        linear_cross_entropy(**arguments)  # type: ignore[arg-type]


@interpreted
def test_supported_says_why() -> None:
    hidden, weight = torch.zeros(2, 8), torch.zeros(7, 8)
    assert supported(hidden, weight) == "kernels need a GPU"
    with kernels_on_cpu():
        assert supported(hidden, weight) is None
        assert "float64" in str(supported(hidden, weight.double()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_at_the_size_of_a_model(dtype: torch.dtype) -> None:
    """Llama 3's head, chunks that do not divide the rows; against float64 on the rows that are compared."""
    device = torch.device("cuda")
    hidden, weight, _, labels = inputs(1500, 1024, 128256, dtype, device, 0)
    grad = torch.tensor(1024.0, device=device)
    rows = int((labels != IGNORE_INDEX).sum())
    got = oracle_gradients(ours(labels, PLAIN, supervised_rows=rows, chunk_bytes=128 << 20), (hidden, weight), (grad,))
    usual = oracle_gradients(lambda h, w: stock(h, w, None, labels, PLAIN, None), (hidden, weight), (grad,))
    exact = oracle_gradients(
        lambda h, w: stock(h, w, None, labels, PLAIN, None), (hidden.double(), weight.double()), (grad,)
    )
    accuracy = Accuracy()
    for name, *grads in zip(("dhidden", "dweight"), got[1], usual[1], exact[1]):
        accuracy.add(name, *grads)
    accuracy.check()
    assert abs(got[0][0] - exact[0][0]) <= 3 * max(abs(usual[0][0] - exact[0][0]), 2.0**-22 * exact[0][0])


@pytest.mark.gpu
def test_memory_is_a_chunk() -> None:
    device, chunk_bytes = torch.device("cuda"), 64 << 20
    hidden, weight, _, labels = inputs(8192, 64, 128256, torch.bfloat16, device, 0, ignored=0.0)
    linear_cross_entropy_forward(hidden[:256], weight, labels[:256])  # cuBLAS's workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy_forward(hidden, weight, labels, chunk_bytes=chunk_bytes)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < chunk_bytes + hidden.nbytes + (8 << 20)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """Other labels, other numbers of them, other upstream gradients: one graph."""
    device = torch.device("cuda")
    hidden, weight, _, labels = inputs(512, 64, 1000, torch.float16, device, 0)
    items, grad = torch.tensor(100.0, device=device), torch.ones((), device=device)

    def run() -> tuple[Tensor, Tensor]:
        result = linear_cross_entropy_forward(
            hidden, weight, labels, num_items=items, supervised_rows=350, chunk_bytes=128 * 1024 * 2
        )
        dhidden = linear_cross_entropy_backward(result, grad, torch.float16)[0]
        assert dhidden is not None
        return result.loss, dhidden

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        labels.copy_(inputs(512, 64, 1000, torch.float16, device, seed)[3])
        items.fill_(50.0 * seed)
        grad.fill_(float(seed))
        graph.replay()
        for a, b in zip(captured, run()):
            assert torch.equal(a, b)
