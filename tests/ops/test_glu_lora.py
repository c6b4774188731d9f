from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyralis.ops import glu_lora
from pyralis.ops._triton import Gpu, gpu_of, kernels_on_cpu
from pyralis.ops.glu import Activation, glu_forward, split_gate_up
from pyralis.ops.glu import reference as glu_reference
from pyralis.ops.glu import reference_backward as glu_reference_backward
from pyralis.ops.glu_lora import (
    DownGradients,
    GateUpGradients,
    GluLoraLaunch,
    forward_supported,
    glu_lora_backward,
    glu_lora_forward,
    partial_bytes,
    reference,
    supported,
)
from pyralis.ops.lora_group import LoraGroup, LoraProjection
from pyralis.ops.lora_tiles import Tile
from tests.ops.harness import Accuracy, assert_deterministic, guarded, interpreted, random

CPU = torch.device("cpu")
ACTIVATIONS = get_args(Activation)
ADAPTED = {"all": (1, 1, 1), "gate down": (1, 0, 1), "up": (0, 1, 0), "down": (0, 0, 1), "one matrix": (2, 1)}


class Problem:
    """Inputs of both directions, and buffers for outputs full of NaN between guards."""

    def __init__(
        self,
        adapted: tuple[int, ...],
        T: int,
        size: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        one = len(adapted) == 2  # gate and up are one projection
        sizes = [2 * size] if one else [size, size]
        self.group = LoraGroup(24, tuple(LoraProjection(n, rank * min(a, 1), 1.7) for n, a in zip(sizes, adapted)))
        self.down = LoraGroup(size, (LoraProjection(24, rank, 0.6),))
        self.has_down = bool(adapted[-1])
        self.size, N, P = size, 2 * size, self.group.pad

        def normal(*shape: int, scale: float = 1.0, skip: int = 1) -> Tensor:
            return random(*shape, dtype=dtype, device=device, seed=100 * seed + skip, scale=scale)

        self.wide = normal(T, N + P + 3, scale=2.0)[:, : N + P]
        self.dh = normal(T, size + 5, skip=2)[:, :size]
        self.xa, self.t_down = normal(T, P + 1, skip=3)[:, :P], normal(T, rank + 2, skip=4)[:, :rank]
        self.B = [
            normal(p.out_features, rank + 4, scale=size**-0.5, skip=5 + j)[:, :rank] if p.rank else None
            for j, p in enumerate(self.group.projections)
        ]
        self.A = normal(self.down.pad, size + 8, scale=size**-0.5, skip=8)[:, :size]
        self.A[rank:] = 0
        self.gate_up = self.wide[:, :N].clone()

    def outputs(self) -> tuple[list, list]:
        """(t, dB_j and dA in the order of `run`'s results, their guards)"""
        device, T = self.dh.device, len(self.dh)
        shapes = [(p.out_features, p.rank) for p in self.group.projections if p.rank]
        shapes += [(self.down.rank, self.size)] if self.has_down else []
        buffers = [guarded(*shape, dtype=torch.float32, device=device) for shape in shapes]
        if self.group.rank:
            P = self.group.pad
            buffers.insert(0, guarded(T, P, dtype=self.dh.dtype, device=device, stride=P + 3))
        return [b.view for b in buffers], buffers

    def run(self, activation: Activation, outputs: list[Tensor], accumulate: bool = False) -> tuple[Tensor, ...]:
        """[dgate | dup], t, dB_j, dA: the last three in `outputs`."""
        rest, lora, down = list(outputs), None, None
        if self.group.rank:
            t = rest.pop(0)
            dB = [rest.pop(0) if p.rank else None for p in self.group.projections]
            lora = GateUpGradients(self.group, self.B, self.xa, t, dB, accumulate)
        if self.has_down:
            down = DownGradients(self.t_down, rest.pop(0), accumulate)
        gate_up, dh = self.wide[:, : 2 * self.size], self.dh.clone()
        gate_up.copy_(self.gate_up)
        with kernels_on_cpu(self.dh.device.type == "cpu"):
            assert supported(dh, gate_up, lora, down) is None
        glu_lora_backward(dh, gate_up, activation, lora=lora, down=down)
        return gate_up, *outputs

    def products(self, activation: Activation, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The same in `dtype`; what is half precision is rounded to it on the way."""
        gate, up = split_gate_up(self.gate_up.to(dtype))
        dy = torch.cat(glu_reference_backward(self.dh.to(dtype), gate, up, activation), 1).to(dtype)
        found, dB = [dy], []
        if self.group.rank:
            t = torch.zeros(len(dy), self.group.pad, dtype=dtype, device=dy.device)
            for rows, columns, B in zip(self.group.rows, self.group.columns, self.B):
                if B is not None:
                    t[:, columns] = (dy[:, rows] @ B.to(dtype)) * 1.7
                    dB.append(dy[:, rows].t() @ self.xa[:, columns].to(dtype))
            found += [t, *dB]
        if self.has_down:
            found.append(self.t_down.to(dtype).t() @ glu_reference(gate, up, activation))
        return tuple(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "activation", "size", "rank"),
    [("all", "silu", 300, 16), ("all", "gelu", 70, 5), ("gate down", "gelu_tanh", 256, 8), ("up", "silu", 256, 16),
     ("down", "silu", 520, 1), ("one matrix", "silu", 270, 16), ("all", "silu", 200, 32)],
)  # fmt: skip
def test_backward(
    device: torch.device, name: str, activation: Activation, size: int, rank: int, dtype: torch.dtype
) -> None:
    accuracy = Accuracy()
    for seed, T in ((0, 45), (1, 32)):
        problem = Problem(ADAPTED[name], T, size, rank, dtype, device, seed)
        outputs, guards = problem.outputs()
        got = problem.run(activation, outputs)
        for guard in guards:
            guard.check()
        stock, oracle = problem.products(activation, dtype), problem.products(activation, torch.float64)
        for index, (a, b, c) in enumerate(zip(got, stock, oracle, strict=True)):
            accuracy.add(f"output {index}", a, b.to(a.dtype), c)
        before = [x.clone() for x in got]
        again = problem.run(activation, outputs, accumulate=True)
        for a, b in zip(again, before):
            factor = 2 if a.dtype == torch.float32 else 1
            torch.testing.assert_close(a, factor * b, rtol=1e-5, atol=1e-5)
    accuracy.check()


@pytest.mark.parametrize("name", ADAPTED)
def test_partial_sums_are_counted(device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, sizes, launch = Problem(ADAPTED[name], 45, 270, 16, torch.bfloat16, device, 3), [], glu_lora.launch

    def recorded(kernel: Any, grid: Any, *args: Any, **how: Any) -> None:
        if kernel is glu_lora.glu_lora_backward_kernel:
            sizes.append(sum(part.nbytes for part in args[6:9] if part is not None))
        launch(kernel, grid, *args, **how)

    monkeypatch.setattr(glu_lora, "launch", recorded)
    problem.run("gelu", problem.outputs()[0])  # whose launch is the same for rows that are not aligned
    lora = problem.group if problem.group.rank else None
    assert sizes == [partial_bytes(45, 270, 16, gpu_of(device), "gelu", lora=lora, down=problem.has_down)]


@pytest.mark.parametrize("name", ADAPTED)
def test_backward_is_the_separate_ops(device: torch.device, name: str) -> None:
    """dgate and dup bit by bit, and products of those very numbers."""
    problem = Problem(ADAPTED[name], 45, 270, 16, torch.bfloat16, device, 3)
    fused = [x.clone() for x in problem.run("silu", problem.outputs()[0])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glu_lora, "supported", lambda *_: "to be compared")
        patch.setitem(globals(), "supported", lambda *_: None)
        apart = problem.run("silu", problem.outputs()[0])
    assert torch.equal(fused[0], apart[0])
    for a, b in zip(fused[1:], apart[1:]):
        half = a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=8e-3 if half else 1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("activation", "size", "rank"), [("silu", 300, 16), ("gelu", 70, 3), ("gelu_tanh", 500, 32), ("silu", 48, 16)]
)
def test_forward(device: torch.device, activation: Activation, size: int, rank: int, dtype: torch.dtype) -> None:
    accuracy = Accuracy()
    for seed, T in ((0, 45), (1, 32)):
        problem = Problem((1, 1, 1), T, size, rank, dtype, device, seed)
        out = guarded(T, problem.down.width, dtype=dtype, device=device, stride=problem.down.width + 7)
        gate_up = problem.wide[:, : 2 * size]
        with kernels_on_cpu(device.type == "cpu"):
            assert forward_supported(gate_up, problem.A, out.view, problem.down) is None
        xa = glu_lora_forward(gate_up, activation, problem.down, problem.A, out=out.view)
        out.check()
        assert torch.equal(xa, out.view[:, size:])
        assert not xa[:, rank:].any()
        made, A = out.view[:, :size], problem.A[:rank]
        assert torch.equal(made, glu_forward(*split_gate_up(gate_up), activation))
        accuracy.add("xa", xa[:, :rank], (made @ A.t()) * 0.6, (made.double() @ A.double().t()) * 0.6)
    accuracy.check()


def test_deterministic_over_splits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of programs: dgate, dup and t bit by bit; each number of them repeats itself."""
    results = []
    for sm_count in (1, 132):
        monkeypatch.setattr(glu_lora, "gpu_of", lambda _, n=sm_count: Gpu((8, 0), n))
        problem = Problem((1, 1, 1), 260, 40, 16, torch.bfloat16, device, 4)

        def run(problem: Problem = problem) -> tuple[Tensor, ...]:
            out = torch.empty(260, problem.down.width, dtype=torch.bfloat16, device=device)
            glu_lora_forward(problem.gate_up, "silu", problem.down, problem.A, out=out)
            return out, *problem.run("silu", problem.outputs()[0])

        assert_deterministic(run)
        results.append(run())
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:3], results[1][1:3]))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@interpreted
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 70), size=st.integers(1, 150), rank=st.integers(1, 32), adapted=st.sampled_from(list(ADAPTED)),
    activation=st.sampled_from(ACTIVATIONS),
    plan=st.sampled_from([(Tile(16, 32, 4), 1), (Tile(64, 64, 4, 2, (64,)), 2), (Tile(32, 32, 4), 2)]),
)  # fmt: skip
def test_any_shape_and_launch(
    T: int, size: int, rank: int, adapted: str, activation: Activation, plan: tuple[Tile, int]
) -> None:
    problem, results = Problem(ADAPTED[adapted], T, size, rank, torch.float16, CPU, 5), []
    for enabled in (True, False):
        with kernels_on_cpu(enabled), pytest.MonkeyPatch.context() as patch:
            patch.setattr(GluLoraLaunch, "of", lambda *_, **__: GluLoraLaunch(plan[0], *plan))
            out = torch.full((T, problem.down.width), torch.nan).half()
            glu_lora_forward(problem.gate_up, activation, problem.down, problem.A, out=out)
            results.append((out, *(x.clone() for x in problem.run(activation, problem.outputs()[0]))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3)


@interpreted
def test_supported_says_why() -> None:
    dh, gate_up, t = torch.zeros(4, 8).half(), torch.zeros(4, 16).half(), torch.zeros(4, 16).half()
    group = LoraGroup(8, (LoraProjection(8, 2), LoraProjection(8, 2)))
    B, dB = [torch.zeros(8, 2).half()] * 2, [torch.zeros(8, 2)] * 2
    lora, down = GateUpGradients(group, B, t, t, dB), DownGradients(t[:, :2], torch.zeros(2, 8))
    other = LoraGroup(8, (LoraProjection(8, 2), LoraProjection(8, 3)))
    wide = DownGradients(torch.zeros(4, 64).half(), torch.zeros(64, 8))
    assert "need a GPU" in str(supported(dh, gate_up, lora, down))
    with kernels_on_cpu():
        assert supported(dh, gate_up, lora, down) is None
        for reason, arguments in {
            "no adapter": (None, None),
            "above rank 32": (None, wide),
            "differ in rank, scale": (replace(lora, group=other), None),
            "differ in rank": (lora, wide),
            "gradient of B": (replace(lora, dB=[dB[0], None]), down),
            "gradient of A": (lora, replace(down, dA=torch.zeros(2, 8).half())),
            "equally far": (replace(lora, B=[B[0], torch.zeros(8, 4).half()[:, :2]]), down),
        }.items():
            assert reason in str(supported(dh, gate_up, *arguments))
        assert "float32" in str(supported(dh.float(), gate_up.float(), lora, down))


@interpreted
def test_reference_leaves_nothing_out() -> None:
    """Without kernels the op is its parts."""
    problem, results = Problem((1, 1, 1), 9, 20, 4, torch.float16, CPU, 6), []
    for function in (glu_lora_backward, reference):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "glu_lora_backward", lambda dh, x, act, *, f=function, lora, down: (
                f(dh, x, act, lora, down) if f is reference else f(dh, x, act, lora=lora, down=down)
            ))  # fmt: skip
            results.append([x.clone() for x in problem.run("silu", problem.outputs()[0])])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    T, size = 2**17 + 3, 8192
    device = torch.device("cuda", torch.cuda.current_device())
    problem = Problem((1, 1, 1), 8, size, 16, torch.bfloat16, device, 0)
    widths = {name: getattr(problem, name).shape[1] for name in ("wide", "dh", "xa", "t_down", "gate_up")}
    for name, width in widths.items():
        setattr(problem, name, torch.randn(T, width, dtype=torch.bfloat16, device=device))
    got = [x[-5:].clone() for x in problem.run("silu", problem.outputs()[0])[:2]]
    for name in widths:
        setattr(problem, name, getattr(problem, name)[-5:])
    expected = problem.run("silu", problem.outputs()[0])
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
