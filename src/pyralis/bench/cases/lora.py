"""LoRA, forward and backward with all its gradients, on top of the base GEMMs (y and dx of the frozen weight).

All four groups of a layer with and without dropout, as a 4-bit layer runs them (pyralis), beside PEFT's arithmetic; and
groups alone at several ranks. Everywhere also with adapters inside the products and apart from them, what
`concatenates` chooses between. `base GEMMs` is the cost without LoRA.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pyralis.bench.case import BASE, PYRALIS, STOCK, BenchCase, Contender, ModelShape
from pyralis.ops._triton import gpu_of
from pyralis.ops.dropout_mask import new_rng
from pyralis.ops.lora import LoraGradients, lora_backward, lora_forward, lora_project
from pyralis.ops.lora_group import LoraGroup, LoraProjection, concatenates, stack_A, stack_B

RANKS = (16, 64, 256)
DTYPE = torch.bfloat16
TOGETHER, APART = "concatenated", "apart"


def groups(shape: ModelShape, rank: int, dropout: float) -> dict[str, LoraGroup]:
    def group(features: int, *outputs: int) -> LoraGroup:
        return LoraGroup(features, tuple(LoraProjection(n, rank, 2.0, dropout) for n in outputs))

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "qkv": group(shape.hidden, q, kv, kv),
        "o": group(q, shape.hidden),
        "gate_up": group(shape.hidden, shape.intermediate, shape.intermediate),
        "down": group(shape.intermediate, shape.hidden),
    }


def cases(shape: ModelShape, tokens: int) -> list[BenchCase]:
    found = []
    for rank in (16, 64):
        for dropout in (0.0, 0.05):
            layer = list(groups(shape, rank, dropout).values())
            found.append(_case(f"lora layer r={rank} p={dropout}", shape, tokens, layer, peft=True))
    for rank in RANKS:
        for name, group in groups(shape, rank, 0.0).items():
            if name != "o":  # the shape of Llama's q alone
                found.append(_case(f"lora {name} r={rank}", shape, tokens, [group], peft=False))
    return found


def _case(op: str, shape: ModelShape, tokens: int, members: list[LoraGroup], *, peft: bool) -> BenchCase:
    moved = flops = 0
    for group in members:
        N, K, R = group.out_features, group.in_features, group.rank
        moved += DTYPE.itemsize * (2 * N * K + 3 * tokens * K + 2 * tokens * N)
        flops += 4 * tokens * N * K + 6 * tokens * (K * R + sum(p.out_features * p.rank for p in group.projections))
    return BenchCase(op, shape.name, tokens, lambda device: _contenders(members, tokens, device, peft), moved, flops)


def _contenders(members: list[LoraGroup], tokens: int, device: torch.device, peft: bool) -> dict[str, Contender]:
    made = [_one(group, tokens, device, peft) for group in members]

    def together(name: str) -> Contender:
        runs = [one[name] for one in made]
        return lambda: tuple(run() for run in runs)

    return {name: together(name) for name in made[0]}


def _one(group: LoraGroup, tokens: int, device: torch.device, peft: bool) -> dict[str, Contender]:
    N, K = group.out_features, group.in_features

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, dtype=DTYPE, device=device) * scale

    x_wide, dy_wide = normal(tokens, group.width), normal(tokens, group.height)
    x, dy = x_wide[:, :K], dy_wide[:, :N].contiguous()
    A = [normal(p.rank, K, scale=K**-0.5) for p in group.projections]
    B = [normal(p.out_features, p.rank, scale=0.003 * p.rank**-0.5) for p in group.projections]
    weight = normal(group.height, group.width, scale=K**-0.5)
    stack_B(group, B, weight[:N, K:])
    stacked, narrow = stack_A(group, A, weight[N:, :K]), weight[:N, :K].contiguous()
    gradients = LoraGradients.empty(group, device, dtype=torch.float32)
    rng = new_rng(0, device) if group.has_dropout else None
    # A layer makes dy of q, k, v, gate and up itself, where t fits behind it; that of o and down comes from outside.
    given, room = (dy_wide[:, :N], dy_wide) if len(group.projections) > 1 else (dy, None)

    def split(y: Tensor, dx: Tensor) -> tuple[Tensor, ...]:
        return (*(y[:, rows] for rows in group.rows), dx)

    def ours(w: Tensor) -> Contender:
        def run() -> tuple[Tensor, ...]:
            xa = lora_project(group, x_wide, stacked, rng=rng)
            y = lora_forward(group, x_wide, w, B=B)
            return split(y, lora_backward(group, given, w, x, xa, stacked, gradients, B=B, dy_wide=room, rng=rng))

        return run

    def base() -> tuple[Tensor, ...]:
        return split(torch.mm(x, narrow.t()), torch.mm(dy, narrow))

    chosen = weight if concatenates(group, tokens, gpu_of(device)) else narrow
    found: dict[str, Contender] = {PYRALIS: ours(chosen), BASE: base, TOGETHER: ours(weight), APART: ours(narrow)}
    if peft:
        found[STOCK] = _peft(group, x.contiguous(), narrow, A, B, dy)
    return found


def _peft(group: LoraGroup, x: Tensor, weight: Tensor, A: list[Tensor], B: list[Tensor], dy: Tensor) -> Callable:
    leaves = [t.detach().clone().requires_grad_() for t in (x, *A, *B)]
    x, n = leaves[0], len(A)

    def run() -> tuple[Tensor, ...]:
        outputs = []
        for j, p in enumerate(group.projections):
            lora = F.linear(F.linear(F.dropout(x, p.dropout), leaves[1 + j]), leaves[1 + n + j])
            outputs.append(F.linear(x, weight[group.rows[j]]) + lora * p.scale)
        gradients = torch.autograd.grad(outputs, leaves, [dy[:, rows] for rows in group.rows])
        return (*outputs, gradients[0])

    return run
