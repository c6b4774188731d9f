"""AdamW over a flat buffer: 32-bit and 8-bit states, with the bf16 copy, and the norm before it. Tokens: any."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyralis.bench.case import BITSANDBYTES, PYRALIS, STOCK, BenchCase, Contender, ModelShape, has
from pyralis.ops._triton import cdiv
from pyralis.ops.adamw import Groups, State32bit, adamw_step
from pyralis.ops.adamw_8bit import BLOCK, State8bit
from pyralis.ops.grad_norm import StepScalars, begin_step, global_norm

LORA_PARAMETERS = 41_943_040  # r = 16 on all seven projections of Llama-3-8B
TINY = 1001
BETA1, BETA2, EPS, LR, DECAY = 0.9, 0.999, 1e-8, 1e-4, 0.01
HYPER = {"lr": LR, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": DECAY}
FUSED = "torch fused"


def cases(shape: ModelShape, tokens: int) -> list[BenchCase]:
    n = TINY if shape.name == "tiny" else LORA_PARAMETERS
    dtype = torch.float32

    def norm(device: torch.device) -> dict[str, Contender]:
        grads, scalars = torch.randn(n, device=device), StepScalars.new(device)
        return {
            PYRALIS: lambda: global_norm(grads, scalars),
            STOCK: lambda: torch.linalg.vector_norm(grads),
        }

    def moved(state_bytes: int) -> int:  # parameter read and written, gradient read, two states read and written
        return n * (3 * dtype.itemsize + 4 * state_bytes)

    scales = 4 * 4 * cdiv(n, BLOCK)
    found: list[tuple[str, Callable[[torch.device], dict[str, Contender]], int]] = [
        ("gradient norm", norm, n * dtype.itemsize),
        ("adamw, 32-bit states", lambda device: _update(n, device, eight_bit=False, copied=False), moved(4)),
        ("adamw, 8-bit states", lambda device: _update(n, device, eight_bit=True, copied=False), moved(1) + scales),
        ("adamw, 8-bit, bf16 copy", lambda d: _update(n, d, eight_bit=True, copied=True), moved(1) + scales + 2 * n),
    ]
    return [BenchCase(name, shape.name, tokens, made, moves, dtype=dtype) for name, made, moves in found]


def _update(n: int, device: torch.device, *, eight_bit: bool, copied: bool) -> dict[str, Contender]:
    params, grads = torch.randn(n, device=device), 1e-3 * torch.randn(n, device=device)
    state = State8bit.zeros(n, device) if eight_bit else State32bit.zeros(n, device)
    scalars, groups = StepScalars.new(device), Groups.one(LR, DECAY, device)
    begin_step(grads, scalars, beta1=BETA1, beta2=BETA2)
    copy = torch.empty(n, dtype=torch.bfloat16, device=device) if copied else None

    def ours() -> Tensor:
        adamw_step(
            params, grads, state, scalars, groups, beta1=BETA1, beta2=BETA2, eps=EPS, compute_copy=copy
        )  # fmt: skip
        return params

    found: dict[str, Contender] = {PYRALIS: ours}
    if eight_bit:
        if has("bitsandbytes") and device.type == "cuda":
            found[BITSANDBYTES] = _bitsandbytes(params.clone(), grads, copy)
    else:
        found[STOCK] = _stock(params.clone(), grads, fused=False)
        if device.type == "cuda":
            found[FUSED] = _stock(params.clone(), grads, fused=True)
    return found


def _stock(params: Tensor, grads: Tensor, *, fused: bool) -> Contender:
    parameter = torch.nn.Parameter(params)
    parameter.grad = grads
    capturable = params.device.type == "cuda"
    optimizer = torch.optim.AdamW([parameter], **HYPER, fused=fused, capturable=capturable)  # type: ignore[arg-type]

    def step() -> Tensor:
        optimizer.step()
        return parameter.detach()

    return step


def _bitsandbytes(params: Tensor, grads: Tensor, copy: Tensor | None) -> Contender:
    """Its kernel alone: its optimizer waits for the GPU after each parameter. It launches on the default stream."""
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    state = State8bit.zeros(params.numel(), params.device)
    signed, unsigned = state.tables[:256], state.tables[256:512]

    def step() -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("bitsandbytes launches on the default stream: a graph would be empty")
        optimizer_update_8bit_blockwise(
            "adam", grads, params, state.m_codes, state.v_codes, BETA1, BETA2, 0.0, 0.0, EPS, 1, LR,
            signed, unsigned, state.m_scale, state.v_scale, DECAY,
        )  # fmt: skip
        return params if copy is None else copy.copy_(params)

    return step
