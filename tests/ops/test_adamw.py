from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyralis.ops._triton import cdiv, kernels_on_cpu
from pyralis.ops.adamw import (
    Groups,
    State32bit,
    adamw_step,
    joined,
    reference,
    round_stochastically,
    split,
    supported,
)
from pyralis.ops.grad_norm import StepScalars, begin_step
from tests.ops.harness import Accuracy, assert_deterministic, guarded, interpreted, random

BETAS = {"beta1": 0.9, "beta2": 0.999}
LR, DECAY, EPS = 1e-2, 0.1, 1e-8


def gradient(n: int, device: torch.device, step: int) -> Tensor:
    """Of very different sizes, as those of a model's parameters are."""
    spread = random(n, dtype=torch.float32, device=device, seed=9).mul(2).exp()
    return random(n, dtype=torch.float32, device=device, seed=step, scale=1e-3) * spread


def steps(p: Tensor, state: State32bit, count: int, device: torch.device, **options: Tensor | None) -> StepScalars:
    scalars, groups = StepScalars.new(device), Groups.one(LR, DECAY, device)
    for step in range(count):
        grads = gradient(len(p), device, step)
        begin_step(grads, scalars, **BETAS, measure=False)
        adamw_step(p, grads, state, scalars, groups, **BETAS, eps=EPS, **options)
    return scalars


def stock_steps(start: Tensor, gradients: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(p, m, v) of torch's AdamW, in the dtype of `start`."""
    parameter = torch.nn.Parameter(start.clone())
    stock = torch.optim.AdamW([parameter], lr=LR, weight_decay=DECAY, eps=EPS, fused=False, foreach=False)
    for grads in gradients:
        parameter.grad = grads.to(start.dtype)
        stock.step()
    return parameter.detach(), stock.state[parameter]["exp_avg"], stock.state[parameter]["exp_avg_sq"]


@pytest.mark.parametrize("n", [1, 255, 1000, 2048])
def test_fifty_steps_of_torch(device: torch.device, n: int) -> None:
    start = random(n, dtype=torch.float32, device=device, seed=77)
    p, state = start.clone(), State32bit.zeros(n, device)
    steps(p, state, 50, device)
    expected = stock_steps(start, [gradient(n, device, step) for step in range(50)])
    for ours, stock in zip((p, state.m, state.v), expected):
        torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6 * float(stock.abs().max()))


def test_fifty_steps_against_float64(device: torch.device) -> None:
    n, accuracy = 5000, Accuracy()
    start = random(n, dtype=torch.float32, device=device, seed=78)
    gradients = [random(n, dtype=torch.float32, device=device, seed=s, scale=1e-3) for s in range(50)]
    p, state, scalars = start.clone(), State32bit.zeros(n, device), StepScalars.new(device)
    for grads in gradients:
        begin_step(grads, scalars, **BETAS)
        adamw_step(p, grads, state, scalars, Groups.one(LR, DECAY, device), **BETAS, eps=EPS)
    stock, oracle = stock_steps(start, gradients), stock_steps(start.double(), gradients)
    for name, *values in zip(("p", "m", "v"), (p, state.m, state.v), stock, oracle):
        accuracy.add(name, *values)
    accuracy.check()


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 300, 2000])
def test_kernel_is_the_reference(device: torch.device, n: int, grad_dtype: torch.dtype) -> None:
    """States bit by bit; parameters within 4 units in the last place of the larger of old value and update, since
    torch's square root on a CPU is not always the nearest."""
    p, m = (random(n, dtype=torch.float32, device=device, seed=s) for s in (1, 2))
    v = random(n, dtype=torch.float32, device=device, seed=3).square()
    grads = random(n, dtype=grad_dtype, device=device, seed=4)
    buffers = [guarded(n, dtype=torch.float32, device=device) for _ in range(3)]
    for buffer, value in zip(buffers, (p, m, v)):
        buffer.view.copy_(value)
    copy = guarded(n, dtype=torch.bfloat16, device=device)
    scalars, groups = StepScalars.new(device), Groups.one(LR, DECAY, device)
    begin_step(grads, scalars, **BETAS, max_norm=0.7)
    new_p, new_m, new_v = (b.view for b in buffers)
    adamw_step(new_p, grads, State32bit(new_m, new_v), scalars, groups, **BETAS, eps=EPS, compute_copy=copy.view)
    for buffer in (*buffers, copy):
        buffer.check()
    expected = reference(
        p, grads.float() * scalars.factor, m, v, lr=groups.lr, weight_decay=groups.weight_decay, **BETAS, eps=EPS,
        correction1=scalars.correction1, root_correction2=scalars.root_correction2,
    )  # fmt: skip
    assert torch.equal(new_m, expected[1])
    assert torch.equal(new_v, expected[2])
    largest = torch.maximum(p.abs(), (p - expected[0]).abs())
    assert bool(((new_p - expected[0]).abs() <= 4 * torch.finfo(torch.float32).eps * largest).all())
    assert torch.equal(copy.view, new_p.bfloat16())


def test_skipped_step_changes_nothing(device: torch.device) -> None:
    n = 700
    p, state = random(n, dtype=torch.bfloat16, device=device, seed=1), State32bit.zeros(n, device)
    copy = torch.ones(n, dtype=torch.float16, device=device)
    low_bits = torch.full((n,), 5, dtype=torch.int16, device=device)
    scalars, groups = StepScalars.new(device), Groups.one(LR, DECAY, device)
    everything = (p, state.m, state.v, copy, low_bits, scalars.step)
    for bad in (False, True):
        grads = gradient(n, device, 1)
        grads[n // 2] = float("nan") if bad else 1.0
        before = [t.clone() for t in everything]
        begin_step(grads, scalars, **BETAS)
        adamw_step(
            p, grads, state, scalars, groups, **BETAS, eps=EPS, compute_copy=copy, low_bits=low_bits
        )  # fmt: skip
        for old, new in zip(before, everything):
            assert torch.equal(old, new) == bad


def test_groups_have_their_own_rates(device: torch.device) -> None:
    n = 256 * 5 + 10
    start, grads = random(n, dtype=torch.float32, device=device, seed=1), gradient(n, device, 0)
    index = torch.tensor([1, 1, 0, -1, 2, 0], dtype=torch.int32, device=device)
    lrs, decays = (1e-2, 3e-3, 1e-1), (0.0, 0.1, 0.01)
    p, state, scalars = start.clone(), State32bit.zeros(n, device), StepScalars.new(device)
    begin_step(grads, scalars, **BETAS)
    groups = Groups(torch.tensor(lrs, device=device), torch.tensor(decays, device=device), index)
    adamw_step(p, grads, state, scalars, groups, **BETAS, eps=EPS)
    for block, group in enumerate(index.tolist()):
        part = slice(block * 256, (block + 1) * 256)
        expected, alone = start[part].clone(), State32bit.zeros(len(start[part]), device)
        if group >= 0:
            one = Groups.one(lrs[group], decays[group], device)
            adamw_step(expected, grads[part].clone(), alone, scalars, one, **BETAS, eps=EPS)
        assert torch.equal(p[part], expected)
        assert torch.equal(state.m[part], alone.m)
        assert torch.equal(state.v[part], alone.v)


def test_split_weights_are_float32_bit_by_bit(device: torch.device) -> None:
    """Updates of a hundredth of bfloat16's precision: rounding to nearest loses them, the lower bits keep them all."""
    n, count = 700, 20
    plain = (1 + random(n, dtype=torch.bfloat16, device=device, seed=1).abs()) * random(
        n, dtype=torch.bfloat16, device=device, seed=2
    ).sign()
    exact, upper, low_bits = plain.float(), plain.clone(), torch.zeros(n, dtype=torch.int16, device=device)
    start = exact.clone()
    groups, states = Groups.one(1e-4, DECAY, device), [State32bit.zeros(n, device) for _ in range(3)]
    scalars = StepScalars.new(device)
    for step in range(count):
        grads = gradient(n, device, step)
        begin_step(grads, scalars, **BETAS)
        adamw_step(exact, grads, states[0], scalars, groups, **BETAS, eps=EPS)
        adamw_step(plain, grads, states[1], scalars, groups, **BETAS, eps=EPS)
        adamw_step(upper, grads, states[2], scalars, groups, **BETAS, eps=EPS, low_bits=low_bits)
        assert torch.equal(joined(upper, low_bits), exact)
        assert bool(((upper.float() - exact).abs() <= (exact.bfloat16().float() - exact).abs()).all())
    assert torch.equal(states[2].v, states[0].v)
    assert float((plain.float() - exact).abs().max()) > 0.5 * float((start - exact).abs().max())


def test_split_of_odd_values() -> None:
    odd = torch.tensor([0.0, -0.0, 1.5, -1.00390625, 1.00390625, 1e-42, -1e-42, 3.4028235e38])
    upper, low_bits = split(odd)
    assert torch.equal(joined(upper, low_bits).view(torch.int32), odd.view(torch.int32))
    upper, low_bits = split(torch.tensor([float("inf"), -float("inf"), float("nan")]))
    assert upper.float().tolist()[:2] == [float("inf"), -float("inf")]
    assert bool(upper[2].isnan())
    assert low_bits.tolist() == [0, 0, 0]


def test_stochastic_rounding_is_unbiased(device: torch.device) -> None:
    """The mean over elements is the exact value, within 5 standard errors; a new step draws new bits."""
    n, value = 4096, 1.0
    step = value * 0.3 * 2**-7  # 0.3 of bfloat16's spacing above 1
    scalars, groups = StepScalars.new(device), Groups.one(step, 0.0, device)
    grads, seed = -torch.ones(n, device=device), torch.tensor([1234], device=device)
    results = []
    for count in (1, 1, 2):
        if count == 2 or not results:
            begin_step(grads, scalars, **BETAS, measure=False)
        p = torch.full((n,), value, dtype=torch.bfloat16, device=device)
        state = State32bit(-torch.ones(n, device=device), torch.ones(n, device=device))
        state.m.mul_(scalars.correction1)
        state.v.mul_(scalars.root_correction2.square())
        start = [t.clone() for t in (state.m, state.v)]
        adamw_step(p, grads, state, scalars, groups, **BETAS, eps=EPS, seed=seed)
        exact, _, _ = reference(
            torch.full((n,), value, device=device), grads, *start, lr=groups.lr, weight_decay=groups.weight_decay,
            correction1=scalars.correction1, root_correction2=scalars.root_correction2, **BETAS, eps=EPS,
        )  # fmt: skip
        assert set(p.float().tolist()) == {1.0, 1.0 + 2**-7}
        share = (float(exact[0]) - 1.0) * 2**7
        up = float((p > 1).double().mean())
        assert abs(up - share) < 5 * (share * (1 - share) / n) ** 0.5
        results.append(p)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_stochastic_rounding_follows_float64_over_many_steps(device: torch.device) -> None:
    """100 steps of 0.02 units in the last place: to nearest nothing moves; the mean of 2048 elements that are rounded
    stochastically is that of the float64 oracle within 5 standard errors; split weights are it within float32's."""
    n, count, unit = 2048, 100, 2.0**-7  # bfloat16's above 1
    groups, grads = Groups.one(0.02 * unit, 0.0, device), -torch.ones(n, device=device)
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    oracle = torch.optim.AdamW([parameter], lr=0.02 * unit, weight_decay=0.0, eps=EPS)
    seed, low_bits = torch.tensor([3], device=device), torch.zeros(n, dtype=torch.int16, device=device)
    found = {}
    for name, options in {
        "nearest": {}, "stochastic": {"seed": seed}, "split": {"low_bits": low_bits},
    }.items():  # fmt: skip
        p = found[name] = torch.ones(n, dtype=torch.bfloat16, device=device)
        state, scalars = State32bit.zeros(n, device), StepScalars.new(device)
        for _ in range(count):
            begin_step(grads, scalars, **BETAS, measure=False)
            adamw_step(p, grads, state, scalars, groups, **BETAS, eps=EPS, **options)
    for _ in range(count):
        parameter.grad = -torch.ones_like(parameter)
        oracle.step()
    exact = float(parameter.detach())
    assert abs(exact - 1 - 2 * unit) < 1e-4
    assert bool((found["nearest"] == 1).all())
    moved = found["stochastic"].double()
    assert abs(float(moved.mean()) - exact) < 5 * float(moved.std()) / n**0.5
    assert float((joined(found["split"], low_bits).double() - exact).abs().max()) <= 1e-5 * (exact - 1) + count * 1.2e-7


@pytest.mark.parametrize("options", [{"seed": torch.tensor([7])}, {}], ids=["stochastic", "nearest"])
def test_a_buffer_may_be_cut_between_blocks(device: torch.device, options: dict[str, Tensor]) -> None:
    """The bits of an element are those of its place in the whole buffer."""
    n, options = 256 * 9 + 40, {name: value.to(device) for name, value in options.items()}
    grads, groups = gradient(n, device, 3), Groups.one(LR, DECAY, device)
    whole, cut = (random(n, dtype=torch.bfloat16, device=device, seed=1) for _ in range(2))
    states, scalars = [State32bit.zeros(n, device) for _ in range(2)], StepScalars.new(device)
    begin_step(grads, scalars, **BETAS)
    adamw_step(whole, grads, states[0], scalars, groups, **BETAS, eps=EPS, **options)
    for first, last in ((0, 2), (2, 3), (3, 10)):
        part = slice(first * 256, min(last * 256, n))
        state = states[1].part(part, slice(first, last))
        adamw_step(
            cut[part], grads[part], state, scalars, groups, **BETAS, eps=EPS, first_block=first, **options
        )  # fmt: skip
    assert torch.equal(whole, cut)
    assert torch.equal(states[0].m, states[1].m)
    assert torch.equal(states[0].v, states[1].v)


def test_stochastic_rounding_of_odd_values() -> None:
    odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.5, 3.3895313892515355e38])
    for halves in (0, 0xFFFF):
        rounded = round_stochastically(odd, torch.full((7,), halves, dtype=torch.int32)).float()
        assert torch.equal(rounded.isnan(), odd.isnan())
        assert torch.equal(rounded.nan_to_num(7.0), odd.nan_to_num(7.0))


def test_deterministic(device: torch.device) -> None:
    def run() -> tuple[Tensor, ...]:
        p, state = random(900, dtype=torch.bfloat16, device=device, seed=0), State32bit.zeros(900, device)
        steps(p, state, 3, device, seed=torch.tensor([5], device=device))
        return p, state.m, state.v

    assert_deterministic(run)


@interpreted
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 3000),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    kind=st.sampled_from(["nearest", "stochastic", "split"]),
    grouped=st.booleans(),
)
def test_any_size(n: int, dtype: torch.dtype, kind: str, grouped: bool) -> None:
    """Kernels against the torch path, on the CPU."""
    cpu, results = torch.device("cpu"), []
    dtype = dtype if kind == "nearest" else torch.bfloat16
    index = torch.arange(cdiv(n, 256), dtype=torch.int32) % 3 - 1 if grouped else None
    groups = Groups(torch.tensor([1e-2, 3e-2]), torch.tensor([0.0, 0.1]), index)
    for enabled in (True, False):
        with kernels_on_cpu(enabled):
            p, state, scalars = (
                random(n, dtype=dtype, device=cpu, seed=0),
                State32bit.zeros(n, cpu),
                StepScalars.new(cpu),
            )
            copy = torch.zeros(n, dtype=torch.float16)
            seed = torch.tensor([7]) if kind == "stochastic" else None
            low_bits = torch.zeros(n, dtype=torch.int16) if kind == "split" else None
            for step in range(2):
                grads = gradient(n, cpu, step)
                begin_step(grads, scalars, **BETAS, measure=False)
                adamw_step(
                    p, grads, state, scalars, groups, **BETAS, eps=EPS, compute_copy=copy, seed=seed,
                    low_bits=low_bits,
                )  # fmt: skip
            results.append((p, state.m, state.v, copy))
    (p, m, v, copy), (p2, m2, v2, copy2) = results
    assert torch.equal(m, m2)
    assert torch.equal(v, v2)
    # one bit of the update may turn a rounding to half precision: a unit in the last place there
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(p, p2, rtol=2 * ulp, atol=1e-8)
    assert float((p != p2).double().mean()) < 0.01 or dtype == torch.float32
    torch.testing.assert_close(copy, copy2, rtol=max(2 * ulp, 2e-3), atol=1e-7)


@interpreted
def test_supported_says_why() -> None:
    p = torch.zeros(8)
    assert supported(p, p) == "kernels need a GPU"
    with kernels_on_cpu():
        assert supported(p, p) is None
        assert "not contiguous" in str(supported(p, torch.zeros(16)[::2]))
        assert "float64" in str(supported(p.double(), p))


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    n, tail = 2**31 + 512, 700
    device = torch.device("cuda")
    p = torch.ones(n, dtype=torch.bfloat16, device=device)
    grads = torch.ones(n, dtype=torch.bfloat16, device=device)
    grads[-tail:] = gradient(tail, device, 0)
    state, scalars, groups = State32bit.zeros(n, device), StepScalars.new(device), Groups.one(LR, DECAY, device)
    begin_step(grads, scalars, **BETAS, measure=False)
    adamw_step(p, grads, state, scalars, groups, **BETAS, eps=EPS)
    expected, alone = torch.ones(tail, dtype=torch.bfloat16, device=device), State32bit.zeros(tail, device)
    adamw_step(expected, grads[-tail:].clone(), alone, scalars, groups, **BETAS, eps=EPS)
    assert torch.equal(p[-tail:], expected)
    assert torch.equal(state.m[-tail:], alone.m)
    assert torch.equal(state.v[-tail:], alone.v)
    assert bool((p[:-tail] == p[0]).all())


@pytest.mark.gpu
def test_a_captured_graph_sees_new_rates_and_counts() -> None:
    n, device = 5000, torch.device("cuda")
    start = random(n, dtype=torch.float32, device=device, seed=0)
    results = []
    for captured in (False, True):
        p, state, scalars = start.clone(), State32bit.zeros(n, device), StepScalars.new(device)
        groups, grads = Groups.one(LR, DECAY, device), torch.zeros(n, device=device)

        def step() -> None:
            begin_step(grads, scalars, **BETAS, max_norm=0.1)  # noqa: B023
            adamw_step(p, grads, state, scalars, groups, **BETAS, eps=EPS)  # noqa: B023

        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step()
        for number in range(5):
            grads.copy_(gradient(n, device, number))
            if number == 2:
                grads[7] = float("nan")
            groups.lr.fill_(LR / (number + 1))
            graph.replay() if captured else step()
        assert int(scalars.step) == 4
        results.append((p, state.m, state.v))
    for a, b in zip(*results):
        assert torch.equal(a, b)
