from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyralis.ops._triton import Gpu, kernels_on_cpu, recording
from pyralis.ops.nf4_layer import dequantize_layer, supported
from pyralis.ops.nf4_plan import Copy, LayerPlan, Placement
from pyralis.ops.nf4_state import reference
from tests.ops.harness import assert_deterministic, interpreted, random
from tests.ops.test_nf4 import CPU, DTYPES, matrix, on_meta, same

GAP = 8  # elements between buffers, to see that nothing is written there


@dataclass(frozen=True)
class Group:
    """Projections stacked along N over one input: their out features, in features, LoRA ranks and wide columns."""

    rows: tuple[int, ...]
    cols: int
    ranks: tuple[int, ...]
    wide: int

    def numel(self) -> int:
        return sum(self.rows) * (self.cols + self.wide)


LAYER = (
    Group((48, 16, 16), 64, (4, 4, 4), 16),  # q, k, v
    Group((64,), 48, (4,), 8),  # o
    Group((104, 104), 64, (4, 0), 8),  # gate, up (without LoRA)
    Group((64,), 104, (0,), 0),  # down: not wide
)


def build(
    groups: tuple[Group, ...], dtype: torch.dtype, lora: torch.dtype, device: torch.device, *, mixed: bool = False
) -> tuple[LayerPlan, Tensor, Tensor]:
    """(plan, its poisoned arena, what the arena has to be afterwards)"""
    arena = torch.full((GAP + sum(g.numel() + GAP for g in groups),), float("nan"), dtype=dtype, device=device)
    expected = arena.clone()
    placements, start, seed = [], GAP, 0
    for group in groups:
        buffers = [
            t[start : start + group.numel()].view(sum(group.rows), group.cols + group.wide) for t in (arena, expected)
        ]
        start += group.numel() + GAP
        row = column = 0
        for n, rank in zip(group.rows, group.ranks, strict=True):
            seed += 1
            odd = mixed and seed % 2 == 1
            q = matrix(n, group.cols, device, quant_type="fp4" if odd else "nf4", nested=not odd, seed=seed)
            B = random(n, rank, dtype=lora, device=device, seed=seed) if rank else None
            out, wanted = (b[row : row + n] for b in buffers)
            wanted[:, : group.cols] = reference(q, dtype)
            wanted[:, group.cols :] = 0
            if B is not None:
                wanted[:, group.cols + column : group.cols + column + rank] = B
            placements.append(Placement(q, out, B, column if rank else 0))
            row, column = row + n, column + rank
    return LayerPlan.of(placements, arena), arena, expected


@pytest.mark.parametrize("lora", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mixed", [False, True])
def test_layer(device: torch.device, mixed: bool, dtype: torch.dtype, lora: torch.dtype) -> None:
    plan, arena, expected = build(LAYER, dtype, lora, device, mixed=mixed)
    dequantize_layer(plan, arena)
    assert same(arena, expected)


def test_odd_layer(device: torch.device) -> None:
    groups = (Group((7, 5), 33, (3, 2), 6), Group((3,), 100, (1,), 1), Group((1,), 1, (0,), 0))
    for dtype in DTYPES:
        plan, arena, expected = build(groups, dtype, torch.float32, device)
        assert plan.tiles.vector == 1
        dequantize_layer(plan, arena)
        assert same(arena, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies(device: torch.device, dtype: torch.dtype) -> None:
    """Rows below matrices, longer than a tile and single; rewritten with the wide columns."""
    plan, arena, expected = build(LAYER, dtype, torch.float32, device)
    sizes, copies = ((3, 4100, 4104), (1, 7, 7)), []
    room = sum(rows * stride + GAP for rows, _, stride in sizes)
    arena, expected = (torch.cat([t, t.new_full((room,), float("nan"))]) for t in (arena, expected))
    start = plan.extent + GAP
    for rows, columns, stride in sizes:
        source = random(rows, columns + 3, dtype=dtype, device=device, seed=columns)[:, :columns]
        places = [t.as_strided(source.shape, (stride, 1), start) for t in (arena, expected)]
        places[1].copy_(source)
        copies.append(Copy(source, places[0]))
        start += rows * stride
    moved = [
        replace(p, out=arena.as_strided(p.out.shape, p.out.stride(), offset))
        for p, offset in zip(plan.placements, plan.offsets)
    ]
    plan = LayerPlan.of(moved, arena, copies)
    dequantize_layer(plan, arena)
    assert same(arena, expected)
    for copy in copies:
        copy.out.fill_(float("nan"))
    dequantize_layer(plan, arena, adapters=False)
    assert all(copy.out.isnan().all() for copy in copies)
    dequantize_layer(plan, arena, weights=False)
    assert same(arena, expected)


def test_many_tiles(device: torch.device) -> None:
    """Rows longer than a tile, and more rows than a tile has; trailing and leading matrices without wide columns."""
    groups = (Group((2,), 4104, (0,), 0), Group((3, 70), 264, (2, 70), 72), Group((20,), 264, (0,), 0))
    plan, arena, expected = build(groups, torch.bfloat16, torch.float32, device)
    assert plan.weight_tiles > 6
    assert plan.adapter_tiles > 6
    dequantize_layer(plan, arena)
    assert same(arena, expected)


def test_halves_of_the_work(device: torch.device) -> None:
    plan, arena, expected = build(LAYER, torch.bfloat16, torch.float32, device)
    wide = torch.zeros_like(arena, dtype=torch.bool)
    for p, offset in zip(plan.placements, plan.offsets, strict=True):
        view = wide.as_strided(p.out.shape, p.out.stride(), offset)
        view[:, p.matrix.shape[1] :] = True
    untouched = arena.clone()
    dequantize_layer(plan, arena, adapters=False)
    assert same(arena, torch.where(wide, untouched, expected))
    arena.copy_(untouched)
    dequantize_layer(plan, arena, weights=False)
    assert same(arena, torch.where(wide, expected, untouched))
    arena.copy_(untouched)
    dequantize_layer(plan, arena, weights=False, adapters=False)
    assert same(arena, untouched)


def test_another_arena(device: torch.device) -> None:
    """A plan serves every arena of its layout; one that begins off 16 bytes too."""
    plan, arena, expected = build(LAYER, torch.bfloat16, torch.float32, device)
    for shift in (0, 8, 1):
        storage = torch.full((arena.numel() + shift,), float("nan"), dtype=arena.dtype, device=device)
        dequantize_layer(plan, storage[shift:])
        assert same(storage[shift:], expected)
    assert arena.isnan().all()


def test_new_values_of_B_are_seen(device: torch.device) -> None:
    """Of a parameter too, and what is written stays out of autograd."""
    plan, arena, _ = build(LAYER, torch.bfloat16, torch.float32, device)
    first = plan.placements[0]
    assert first.lora_B is not None
    first.lora_B.fill_(3.0).requires_grad_()
    with kernels_on_cpu(False):
        dequantize_layer(plan, arena)
    dequantize_layer(plan, arena)
    assert not arena.requires_grad
    assert torch.equal(first.out[:, 64:68], torch.full_like(first.out[:, 64:68], 3.0))


def test_deterministic(device: torch.device) -> None:
    plan, arena, _ = build(LAYER, torch.float16, torch.float32, device)
    arena.zero_()

    def run() -> list[Tensor]:
        dequantize_layer(plan, arena)
        return [arena.clone()]

    assert_deterministic(run)


def test_one_launch() -> None:
    source, _, _ = build(LAYER, torch.bfloat16, torch.float32, CPU)
    arena = torch.empty(source.extent, dtype=torch.bfloat16, device="meta")
    placements = [
        Placement(
            on_meta(p.matrix), arena.as_strided(p.out.shape, p.out.stride(), offset),
            None if p.lora_B is None else p.lora_B.to("meta"), p.lora_start,
        )
        for p, offset in zip(source.placements, source.offsets, strict=True)
    ]  # fmt: skip
    with recording(Gpu((9, 0), 132)) as launches:
        dequantize_layer(LayerPlan.of(placements, arena), arena)
    assert [(launch.grid, launch.fp_fusion) for launch in launches] == [
        ((source.weight_tiles + source.adapter_tiles,), False)
    ]


@interpreted
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 90), st.integers(0, 9)), min_size=1, max_size=4),
    pad=st.integers(0, 5), dtype=st.sampled_from(DTYPES), mixed=st.booleans(),
)  # fmt: skip
def test_any_layer(shapes: list[tuple[int, int, int]], pad: int, dtype: torch.dtype, mixed: bool) -> None:
    groups = tuple(Group((n,), k, (rank,), rank + pad) for n, k, rank in shapes)
    plan, arena, expected = build(groups, dtype, torch.float16, CPU, mixed=mixed)
    with kernels_on_cpu():
        dequantize_layer(plan, arena)
    assert same(arena, expected)
    arena.fill_(float("nan"))
    dequantize_layer(plan, arena)  # the reference
    assert same(arena, expected)


def test_refuses_what_does_not_fit() -> None:
    q, arena = matrix(4, 64, CPU), torch.empty(4 * 72, dtype=torch.bfloat16)
    out = arena.view(4, 72)
    B = torch.zeros(4, 4)
    for bad in (
        Placement(q, out[:3]),
        Placement(q, out[:, :60]),
        Placement(q, out.clone()),
        Placement(q, out.float()),
        Placement(q, out, B, 5),
        Placement(q, out, torch.zeros(3, 4)),
    ):
        with pytest.raises(AssertionError):
            LayerPlan.of([bad], arena)
    plan = LayerPlan.of([Placement(q, out, B, 4)], arena)
    for wrong in (arena[:-1], arena.float(), out):
        with pytest.raises(AssertionError):
            dequantize_layer(plan, wrong)
    assert supported(plan, arena) == "kernels need a GPU"


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    device = torch.device("cuda")
    plan, arena, expected = build(LAYER, torch.bfloat16, torch.float32, device, mixed=True)
    dequantize_layer(plan, arena)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dequantize_layer(plan, arena)
    for p, offset in zip(plan.placements, plan.offsets, strict=True):
        if p.lora_B is not None:
            p.lora_B.mul_(2)
            wide = expected.as_strided(p.out.shape, p.out.stride(), offset)[:, p.matrix.shape[1] :]
            wide[:, p.lora_start : p.lora_start + p.rank] = p.lora_B
    graph.replay()
    assert same(arena, expected)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    """Destinations past 2^31 elements of an arena."""
    device = torch.device("cuda")
    arena = torch.full((2**31 + 2**20,), float("nan"), dtype=torch.bfloat16, device=device)
    q = matrix(64, 4096, device)
    first, last = (arena[s : s + 64 * 4160].view(64, 4160) for s in (0, 2**31 + 4096))
    B = random(64, 16, dtype=torch.float32, device=device, seed=0)
    dequantize_layer(LayerPlan.of([Placement(q, first, B, 0), Placement(q, last, B, 48)], arena), arena)
    for out, start in ((first, 0), (last, 48)):
        assert same(out[:, :4096], reference(q, torch.bfloat16))
        assert torch.equal(out[:, 4096 + start : 4096 + start + 16], B.bfloat16())
    assert int(arena.isnan().sum()) == arena.numel() - 2 * 64 * 4160
