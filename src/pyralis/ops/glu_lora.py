"""The GLU of `glu.py` together with what LoRA reads of the same [T, I] arrays, forward and backward.

    forward    h = act(gate) * up,  xa = s h A^T of the down projection
    backward   dgate, dup of dh;  t_j = s dy_j B_j and dB_j = dy_j^T xa_j of gate and up, dy = [dgate | dup];
               dA = t^T h of down, with h made again and never written

Apart, the backward's arrays are read three times and h is written: 400 us of an H100 for Llama-3-8B at T = 4096 and
rank 16, of which reading dh, gate and up and writing dgate and dup once takes 195. The numbers are those of the parts:
products take the rounded values and are summed in float32, in a fixed order.

A program of the backward holds dB and dA of a strip of features while it goes over a span of tokens; the parts of t
that strips yield, and those of dB and dA that spans do, are added up afterwards.

Shapes: T tokens, I intermediate features, r the rank, P LoRA columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from pyralis.ops._glu_lora_kernels import glu_lora_backward_kernel, glu_lora_forward_kernel
from pyralis.ops._triton import Gpu, cdiv, gpu_of, launch, next_power_of_2
from pyralis.ops.gemm import gemm
from pyralis.ops.glu import Activation, glu_backward, glu_forward, split_gate_up
from pyralis.ops.lora import lora_project
from pyralis.ops.lora_grad_b import Part, add_up, grad_B
from pyralis.ops.lora_group import LoraGroup
from pyralis.ops.lora_sums import sum_parts
from pyralis.ops.lora_tiles import DotLaunch, Tile, reads_dy_once, span_of
from pyralis.ops.lora_tiles import supported as supports_dot


@dataclass(frozen=True, slots=True, eq=False)
class GateUpGradients:
    """What is made of dy = [dgate | dup]. The group is gate and up, or one projection of 2 I features."""

    group: LoraGroup
    B: Sequence[Tensor | None]  # of each projection, [N_j, r_j]
    xa: Tensor  # s x A^T of the forward, [T, R or P]
    t: Tensor  # [T, P]: filled with s dy B, zeros after R
    dB: Sequence[Tensor | None]  # of each projection, [N_j, r_j] float32
    accumulate: bool = False  # dB is added to


@dataclass(frozen=True, slots=True, eq=False)
class DownGradients:
    """What is made of h, the down projection's input."""

    t: Tensor  # s dy B of that projection, [T, r]
    dA: Tensor  # [r, I] float32
    accumulate: bool = False  # dA is added to


HOPPER = (9, 0)


@dataclass(frozen=True, slots=True)
class GluLoraLaunch:
    """What programs hold at a time: the forward's go over features, the backward's over tokens.

    tiles: 1 or 2, into which a backward's columns are cut. Of each block of tokens a program goes over them one after
    the other: registers for one of them, and for the sums of both.
    """

    forward: Tile
    backward: Tile
    tiles: int

    @classmethod
    @cache
    def of(cls, rank: int, activation: Activation, aligned: bool, capability: tuple[int, int]) -> GluLoraLaunch:
        """aligned: rows start at multiples of 16 elements; others are loaded element by element.

        On an H100 the best of fourteen at Llama-3-8B's and Qwen2-7B's shapes, T = 4096; elsewhere one that spills no
        registers, which there takes 374 us in place of 314 at rank 16 and 618 in place of 438 at 32 (`pays`).
        """
        few = rank <= 16
        forward = Tile(64, 128, 4, 2, (12,)) if few else Tile(64, 128, 8, 2, (16,))
        if activation != "gelu" and aligned and capability == HOPPER:  # erf takes registers
            if few:
                return cls(forward, Tile(64, 128, 4, 2, (24,)), tiles=2)
            return cls(forward, Tile(64, 128, 16, 2, (48,)), tiles=1)
        stages = 2 if few and aligned else 1
        if few and activation != "gelu":
            return cls(forward, Tile(32, 256, 8, stages, (24,)), tiles=2)
        return cls(forward, Tile(32, 128, 8, stages, (24,)), tiles=1)


def pays(device: torch.device, lora: GateUpGradients | None, down: DownGradients | None) -> bool:
    """Whether the backward in one kernel is faster than apart, where it is supported: on an H100 314 us against 416 at
    rank 16; at rank 32 438 against 445, by a launch that spills on other GPUs, and 618 by theirs."""
    return _rank(lora, down) <= 16 or (device.type == "cuda" and gpu_of(device).capability == HOPPER)


def _rank(lora: GateUpGradients | None, down: DownGradients | None) -> int:
    """Of the adapters, which is one."""
    return lora.group.runs[0].like.rank if lora is not None else len(down.dA)  # type: ignore[union-attr]


def supported(dh: Tensor, gate_up: Tensor, lora: GateUpGradients | None, down: DownGradients | None) -> str | None:
    """Why the backward's kernel cannot make these; None if it can."""
    tensors, ranks = [dh, gate_up], set()
    if down is not None:
        if down.dA.dtype != torch.float32 or down.dA.stride(1) != 1:
            return "the gradient of A is not float32 with contiguous rows"
        tensors.append(down.t)
        ranks.add(len(down.dA))
    if lora is not None:
        group = lora.group
        if len(group.runs) != 1:
            return "gate and up differ in rank, scale or dropout"
        for j in group.adapted:
            dB = lora.dB[j] if lora.dB else None
            if dB is None or dB.dtype != torch.float32 or not dB.is_contiguous():
                return "the gradient of B is not wanted, not float32 or not contiguous"
        tensors += [lora.xa, lora.t, *(b for b in lora.B if b is not None)]
        if len({b.stride(0) for b in lora.B if b is not None}) != 1:
            return "the rows of gate's B and up's are not equally far apart"
        ranks.add(group.runs[0].like.rank)
    if len(ranks) != 1:
        return "the adapters differ in rank" if ranks else "no adapter's gradient is asked for"
    if not reads_dy_once(max(ranks)):
        return "above rank 32 a program has no registers for its sums"
    return supports_dot(*tensors)


def reference(
    dh: Tensor, gate_up: Tensor, activation: Activation, lora: GateUpGradients | None, down: DownGradients | None
) -> None:
    """The ops that this one is made of, one after another. h takes dh's memory."""
    gate, up = split_gate_up(gate_up)
    h = glu_backward(dh, gate, up, activation, dgate=gate, dup=up, h_out=dh, need_h=down is not None).h
    if lora is not None:
        grad_B(lora.group, gate_up, lora.B, lora.xa, lora.t, lora.dB, dropout=False, accumulate=lora.accumulate)
    if down is not None:
        assert h is not None
        gemm(down.dA, down.t.t(), h, 1.0, down.accumulate)


def glu_lora_backward(
    dh: Tensor, gate_up: Tensor, activation: Activation = "silu", *,
    lora: GateUpGradients | None = None, down: DownGradients | None = None,
) -> None:  # fmt: skip
    """dgate and dup over gate and up, and what `lora` and `down` ask for. No autograd; without dropout.

    dh [T, I] may be overwritten; gate_up [T, 2 I]; of any row stride. Partial sums are allocated (`partial_bytes`):
    half of dh's bytes at rank 16.
    """
    if supported(dh, gate_up, lora, down) is not None:
        reference(dh, gate_up, activation, lora, down)
        return
    T, size = dh.shape
    device = dh.device
    rank = _rank(lora, down)
    aligned = all(n % 16 == 0 for n in (size, dh.stride(0), gate_up.stride(0)))
    gpu = gpu_of(device)
    plan = GluLoraLaunch.of(rank, activation, aligned, gpu.capability)
    tile, tiles = plan.backward, plan.tiles
    strips, splits = cdiv(size, tile.columns), _splits(tile, T, size, gpu)

    def parts(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    part = None if lora is None else _part(lora.group, size, tile)
    B: tuple[Tensor | None, Tensor | None] = (None, None)
    xa: Tensor | None = None
    t_parts, dB_parts, column = None, None, 0
    if lora is not None and part is not None:
        B, xa, column = _halves(lora.B, size), lora.xa, lora.group.columns[-1].start
        t_parts, dB_parts = parts(sum(part.strips), T, rank), parts(splits, sum(part.sizes), rank)
    t, dA_parts = (None, None) if down is None else (down.t, parts(splits, rank, size))
    launch(
        glu_lora_backward_kernel, (strips, splits), dh, gate_up, *B, xa, t, t_parts, dB_parts, dA_parts,
        T, span_of(T, tile.block_t, splits) * tile.block_t, dh.stride(0), gate_up.stride(0),
        next((b.stride(0) for b in B if b is not None), 0), *(0 if x is None else x.stride(0) for x in (xa, t)),
        device=device, num_warps=tile.warps, num_stages=tile.stages,
        SIZE=size, RANK=rank, UP_COLUMN=column, ACTIVATION=activation,
        BLOCK_T=tile.block_t, BLOCK_N=tile.columns // tiles, BLOCK_R=DotLaunch.of(rank).block_r, TILES=tiles,
    )  # fmt: skip
    if lora is not None and part is not None and t_parts is not None and dB_parts is not None:
        add_up(lora.group, part, t_parts, dB_parts, lora.t, lora.dB, part.run.like.scale, lora.accumulate)
    if down is not None and dA_parts is not None:
        sum_parts(dA_parts, down.dA, 1.0, add=down.accumulate)


def partial_bytes(
    tokens: int, size: int, rank: int, gpu: Gpu, activation: Activation = "silu", *,
    lora: LoraGroup | None, down: bool,
) -> int:  # fmt: skip
    """Of the float32 partial sums that the backward's kernel has allocated: of t, dB, and with `down` of dA.

    size: features of gate; rank: of the adapters. lora: as `GateUpGradients.group`, None without.
    """
    tile = GluLoraLaunch.of(rank, activation, True, gpu.capability).backward
    splits = _splits(tile, tokens, size, gpu)
    elements = splits * size if down else 0
    if lora is not None:
        part = _part(lora, size, tile)
        elements += sum(part.strips) * tokens + splits * sum(part.sizes)
    return 4 * rank * elements


def _splits(tile: Tile, tokens: int, size: int, gpu: Gpu) -> int:
    return tile.splits(cdiv(size, tile.columns), cdiv(tokens, 4 * tile.block_t), 1, gpu.sm_count)


@lru_cache
def _part(group: LoraGroup, size: int, tile: Tile) -> Part:
    """gate's strips and up's, which no strip straddles."""
    part = Part.of(group, group.runs[0], tile)
    if len(group.projections) == 2:
        return part
    assert part.sizes == (2 * size,), "gate and up are two projections, or one"
    return replace(part, strips=(2 * cdiv(size, tile.columns),))


def _halves(B: Sequence[Tensor | None], size: int) -> tuple[Tensor | None, Tensor | None]:
    """(gate's B, up's)"""
    if len(B) == 2:
        return B[0], B[1]
    (both,) = B
    assert both is not None
    return both[:size], both[size:]


def forward_supported(gate_up: Tensor, A: Tensor, out: Tensor, group: LoraGroup) -> str | None:
    """Why the forward's kernel cannot make these; None if it can."""
    if not reads_dy_once(group.rank):
        return "above rank 32 the products are better apart"
    return supports_dot(gate_up, A, out)


def glu_lora_forward(gate_up: Tensor, activation: Activation, group: LoraGroup, A: Tensor, *, out: Tensor) -> Tensor:
    """out [T, I + P] = [h | s h A^T | 0]; returns the P columns. No autograd; without dropout.

    gate_up [T, 2 I], any row stride. group: the down projection's, of rank R > 0. A: [P or R, I].
    """
    T, size = len(gate_up), group.in_features
    if forward_supported(gate_up, A, out, group) is not None:
        gate, up = split_gate_up(gate_up)
        glu_forward(gate, up, activation, out=out[:, :size])
        return lora_project(group, out, A)
    rank, scale, device = group.rank, group.projections[0].scale, out.device
    gpu = gpu_of(device)
    tile = GluLoraLaunch.of(rank, activation, True, gpu.capability).forward
    blocks = cdiv(size, tile.columns)
    splits = tile.splits(cdiv(T, tile.block_t), cdiv(blocks, 4), 1, gpu.sm_count)
    partial = None if splits == 1 else torch.empty((splits, T, rank), dtype=torch.float32, device=device)
    launch(
        glu_lora_forward_kernel, (cdiv(T, tile.block_t), splits), gate_up, A, out, partial,
        T, cdiv(blocks, splits), gate_up.stride(0), A.stride(0), out.stride(0), scale,
        device=device, num_warps=tile.warps, num_stages=tile.stages,
        SIZE=size, RANK=rank, PAD=group.pad - rank, BLOCK_P=next_power_of_2(group.pad - rank), ACTIVATION=activation,
        BLOCK_T=tile.block_t, BLOCK_N=tile.columns, BLOCK_R=DotLaunch.of(rank).block_r,
    )  # fmt: skip
    xa = out[:, size:]
    if partial is not None:
        sum_parts(partial, xa[:, :rank], scale, add=False)
    return xa
