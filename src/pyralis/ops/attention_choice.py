"""Which attention backend serves a layer, and why the others do not: rules over numbers, nothing is run.

cudnn       cuDNN through SDPA's op: the fastest where it serves (H100: 1.5-1.9x FlashAttention-2 up to 32k tokens)
flash       torch's FlashAttention, fixed and variable length: the kernel under `torch.nn.attention.varlen`
flash_attn  the package of that name: the one fused kernel with softcaps that needs no compilation
efficient   torch's memory-efficient attention: GPUs before Ampere, and float32
flex        FlexAttention, compiled at its first use
flash_cpu   torch's FlashAttention for CPUs
math        `reference`, by matrix products: serves everything, holds all scores
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec

Capability = tuple[int, int]
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Rejection:
    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend taken, those that would serve too (fastest first), and those that cannot."""

    name: str
    alternatives: tuple[str, ...]
    rejected: tuple[Rejection, ...]

    def why_not(self, backend: str) -> str | None:
        """Why `backend` was rejected; None if it was not."""
        return next((r.reason for r in self.rejected if r.backend == backend), None)


@dataclass(frozen=True, slots=True)
class Case:
    """What the rules look at. `capability` is the CUDA compute capability; None: not a GPU."""

    spec: AttentionSpec
    packed: bool
    shared: bool
    seq: int
    dtype: torch.dtype
    capability: Capability | None
    deterministic: bool


def _needs_gpu(case: Case, least: Capability) -> str | None:
    if case.capability is None:
        return "needs a GPU"
    if case.capability < least:
        return f"needs compute capability {least[0]}.{least[1]}, this GPU has {case.capability[0]}.{case.capability[1]}"
    return None


def _needs_half(case: Case) -> str | None:
    return None if case.dtype in HALF else f"takes float16 and bfloat16, not {str(case.dtype).removeprefix('torch.')}"


def _no_softcap(case: Case) -> str | None:
    return None if case.spec.softcap is None else "has no softcap"


def _head_dim(case: Case, multiple: int, most: int) -> str | None:
    dim = case.spec.head_dim
    return (
        None
        if dim % multiple == 0 and dim <= most
        else f"head dimension {dim}: takes multiples of {multiple} to {most}"
    )


def _cudnn(case: Case) -> str | None:
    if (reason := _needs_gpu(case, (8, 0)) or _needs_half(case) or _no_softcap(case)) is not None:
        return reason
    if case.deterministic:
        return "its backward is not deterministic"
    if case.packed:
        return "torch calls it without variable lengths for grouped heads"
    if case.spec.window is not None:
        return "torch calls it without a window"
    if case.seq == 1:
        return "takes sequences of 2 tokens or more"
    assert case.capability is not None
    return _head_dim(case, 8, 256 if case.capability >= (9, 0) else 128)  # above 128 it depends on cuDNN's version


def _flash(case: Case) -> str | None:
    return _needs_gpu(case, (8, 0)) or _needs_half(case) or _no_softcap(case) or _head_dim(case, 8, 256)


def _flash_attn(case: Case) -> str | None:
    return _needs_gpu(case, (8, 0)) or _needs_half(case) or _head_dim(case, 8, 256)


def _efficient(case: Case) -> str | None:
    if (reason := _needs_gpu(case, (5, 0)) or _no_softcap(case)) is not None:
        return reason
    assert case.capability is not None
    if case.dtype == torch.bfloat16 and case.capability < (8, 0):
        return "takes bfloat16 from compute capability 8.0 on"
    if case.dtype not in (*HALF, torch.float32):
        return f"takes float16, bfloat16 and float32, not {str(case.dtype).removeprefix('torch.')}"
    if case.shared and case.spec.window is not None:
        return "has no window over shared keys"
    return _head_dim(case, 4 if case.dtype == torch.float32 else 8, 65536)


def _flex(case: Case) -> str | None:
    if (reason := _needs_gpu(case, (8, 0)) or _needs_half(case)) is not None:
        return reason
    if case.shared:
        return "is not called with shared keys"
    return None if case.spec.head_dim >= 16 else f"head dimension {case.spec.head_dim}: takes 16 or more"


def _flash_cpu(case: Case) -> str | None:
    return _no_softcap(case) if case.capability is None else "needs a CPU"


RULES: Mapping[str, Callable[[Case], str | None]] = {  # fastest first
    "cudnn": _cudnn,
    "flash": _flash,
    "flash_attn": _flash_attn,
    "efficient": _efficient,
    "flex": _flex,
    "flash_cpu": _flash_cpu,
    "math": lambda case: None,
}


# They serve sequences of any lengths without holding all scores, and without a mask made for each batch.
VARIABLE_LENGTHS = ("flash", "flash_attn", "efficient", "flash_cpu")


def choose_backend(
    spec: AttentionSpec,
    layout: AttentionLayout,
    dtype: torch.dtype,
    capability: Capability | None,
    deterministic: bool,
    missing: Mapping[str, str] | None = None,
) -> Choice:
    """The fastest backend whose rules allow the call. Pure: the machine is what the arguments say.

    missing: backends that this machine lacks, or that failed there when tried, with the reasons
    (`pyralis.ops.attention.backend_for` fills it in).
    """
    case = Case(
        spec.within(layout.max_seqlen), layout.cu_seqlens is not None, layout.shared is not None, layout.seq, dtype,
        capability, deterministic,
    )  # fmt: skip
    serving, rejected = [], []
    for name, rule in RULES.items():
        reason = rule(case) or (missing or {}).get(name)
        if reason is None:
            serving.append(name)
        else:
            rejected.append(Rejection(name, reason))
    return Choice(serving[0], tuple(serving[1:]), tuple(rejected))
