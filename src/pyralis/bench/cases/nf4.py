"""NF4 dequantisation of one matrix, and of a layer's seven with LoRA's B beside them. The tokens do not matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyralis.bench.case import BITSANDBYTES, COMPILED, PYRALIS, STOCK, BenchCase, Contender, ModelShape, compiled, has
from pyralis.ops.nf4 import dequantize
from pyralis.ops.nf4_layer import dequantize_layer, reference_layer
from pyralis.ops.nf4_plan import LayerPlan, Placement
from pyralis.ops.nf4_state import NestedAbsmax, Quantized, reference

DTYPE = torch.bfloat16
BLOCK, NESTED_BLOCK = 64, 256
RANK, WIDE = 16, 64
ONE_BY_ONE = "a launch each"


def cases(shape: ModelShape, tokens: int) -> list[BenchCase]:
    def matrix(device: torch.device) -> dict[str, Contender]:
        q = random_matrix(shape.intermediate, shape.hidden, device)
        out = torch.empty(q.shape, dtype=DTYPE, device=device)
        found: dict[str, Contender] = {
            PYRALIS: lambda: dequantize(q, out),
            STOCK: lambda: reference(q),
            COMPILED: lambda: compiled(reference)(q),
        }
        if has("bitsandbytes") and device.type == "cuda":
            found[BITSANDBYTES] = _bitsandbytes(q, torch.empty_like(out))
        return found

    def layer(device: torch.device) -> dict[str, Contender]:
        return _layer(shape, device)

    stacks = layer_stacks(shape)
    moved = sum(_moved(n, k) + n * (WIDE * DTYPE.itemsize + RANK * 4) for rows, k in stacks for n in rows)
    return [
        BenchCase("nf4, one matrix", shape.name, tokens, matrix, _moved(shape.intermediate, shape.hidden)),
        BenchCase(f"nf4, layer with B r={RANK}", shape.name, tokens, layer, moved),
    ]


def layer_stacks(shape: ModelShape) -> list[tuple[tuple[int, ...], int]]:
    """(rows of the matrices stacked along N, columns) of qkv, o, gate_up and down."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return [
        ((q, kv, kv), shape.hidden),
        ((shape.hidden,), q),
        ((shape.intermediate, shape.intermediate), shape.hidden),
        ((shape.hidden,), shape.intermediate),
    ]


def random_matrix(n: int, k: int, device: torch.device) -> Quantized:
    """Random bytes: any are a matrix."""
    blocks = -(-n * k // BLOCK)
    packed = torch.randint(256, (n * k // 2,), dtype=torch.uint8, device=device)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device=device)
    scales = 0.01 * torch.rand(-(-blocks // NESTED_BLOCK), device=device)
    code, offset = torch.linspace(-1, 1, 256, device=device), torch.tensor(0.02, device=device)
    return Quantized(packed, absmax, (n, k), BLOCK, "nf4", DTYPE, NestedAbsmax(scales, code, offset, NESTED_BLOCK))


def _moved(n: int, k: int) -> int:
    blocks = n * k // BLOCK
    return n * k // 2 + blocks + 4 * (blocks // NESTED_BLOCK) + n * k * DTYPE.itemsize


def _layer(shape: ModelShape, device: torch.device) -> dict[str, Contender]:
    matrices = [[random_matrix(n, k, device) for n in rows] for rows, k in layer_stacks(shape)]
    adapters = [[torch.randn(q.shape[0], RANK, device=device) for q in stack] for stack in matrices]

    def plan() -> tuple[LayerPlan, Tensor]:
        arena = torch.empty(
            sum(q.shape[0] * (q.shape[1] + WIDE) for stack in matrices for q in stack), dtype=DTYPE, device=device
        )
        placements, start = [], 0
        for stack, factors in zip(matrices, adapters):
            for j, (q, B) in enumerate(zip(stack, factors)):
                out = arena[start:].as_strided((q.shape[0], q.shape[1] + WIDE), (q.shape[1] + WIDE, 1))
                placements.append(Placement(q, out, B, RANK * j))
                start += out.numel()
        return LayerPlan.of(placements, arena), arena

    def with_plan(run: Callable[[LayerPlan, Tensor], None]) -> Contender:
        made, arena = plan()  # its own arena: outputs can be compared

        def call() -> tuple[Tensor, ...]:
            run(made, arena)
            return tuple(p.out for p in made.placements)

        return call

    def one_by_one(plan: LayerPlan, arena: Tensor) -> None:
        for p in plan.placements:
            dequantize(p.matrix, p.out[:, :-WIDE])
            assert p.lora_B is not None
            p.out[:, -WIDE:].zero_()
            p.out[:, p.matrix.shape[1] + p.lora_start :][:, :RANK].copy_(p.lora_B)

    found: dict[str, Contender] = {
        PYRALIS: with_plan(dequantize_layer), ONE_BY_ONE: with_plan(one_by_one), STOCK: with_plan(reference_layer)
    }  # fmt: skip
    if has("bitsandbytes") and device.type == "cuda":  # it writes no wide rows: matrices of their own, without B
        every = [q for stack in matrices for q in stack]
        runs = [_bitsandbytes(q, torch.empty(q.shape, dtype=DTYPE, device=device)) for q in every]
        found[BITSANDBYTES] = lambda: [run() for run in runs]
    return found


def _bitsandbytes(q: Quantized, out: Tensor) -> Contender:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    assert q.nested is not None
    inner: Any = QuantState(q.nested.absmax, code=q.nested.code, blocksize=q.nested.blocksize, dtype=torch.float32)
    state = QuantState(
        q.absmax, shape=torch.Size(q.shape), blocksize=q.blocksize, quant_type=q.quant_type, dtype=q.dtype,
        offset=q.nested.offset, state2=inner,
    )  # fmt: skip
    packed = q.packed.view(-1, 1)
    return lambda: dequantize_4bit(packed, state, out=out)
