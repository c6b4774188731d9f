"""bitsandbytes' 4-bit matrices: their parts, without copies, and what they stand for in readable torch.

    w[i] = table[nibble[i]] * absmax[i // blocksize]                     i counts the elements of [N, K] row by row
    absmax[b] = code[index[b]] * nested_absmax[b // 256] + offset        where absmax is itself quantised ("nested")

Each product and sum is rounded to float32, w once more to the output's dtype. Byte j holds elements 2j (upper four
bits) and 2j + 1.

Shapes: N rows (out features), K columns (in features), B = ceil(N * K / blocksize) blocks.
Source of the maths: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs (2023), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from pyralis.errors import ModelError
from pyralis.ops._triton import FLOAT_DTYPES, cdiv

QuantType = Literal["nf4", "fp4"]
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# The sixteen values of each type by their four bits, as bitsandbytes has them whatever a checkpoint's `quant_map` says.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_VALUES = tuple(sign * value / 12.0 + 0.0 for sign in (1.0, -1.0) for value in _FP4_TWELFTHS)  # + 0.0: no -0.0
TABLE_START = {"nf4": 0, "fp4": 16}  # of a type's values in `code_tables`


@dataclass(frozen=True, slots=True, eq=False)
class NestedAbsmax:
    """How a quantised absmax is decoded."""

    absmax: Tensor  # [ceil(B / blocksize)] float32
    code: Tensor  # [256] float32
    offset: Tensor  # [] float32
    blocksize: int


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """One 4-bit matrix [N, K]; the tensors are the quantiser's own."""

    packed: Tensor  # [ceil(N * K / 2)] uint8
    absmax: Tensor  # [B] float32, or uint8 where `nested` tells how to decode it
    shape: tuple[int, int]
    blocksize: int
    quant_type: QuantType
    dtype: torch.dtype  # of the matrix that was quantised
    nested: NestedAbsmax | None = None

    @property
    def device(self) -> torch.device:
        return self.packed.device


@lru_cache
def code_tables(device: torch.device) -> Tensor:
    """[32] float32: the values of NF4, then those of FP4. Made once a device, outside of any graph capture."""
    return torch.tensor(NF4_VALUES + FP4_VALUES, dtype=torch.float32, device=device)


def from_params4bit(weight: Any) -> Quantized:
    """The parts of a `bitsandbytes.nn.Params4bit`. Raises ModelError for one that is not quantised yet."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise ModelError(
            f"A 4-bit weight was expected, got {type(weight).__name__} of shape {tuple(weight.shape)} and dtype "
            f"{weight.dtype} without a quantisation state; bitsandbytes quantises when a layer is moved to its device: "
            "move it first."
        )
    return from_quant_state(weight.data, state)


def from_quant_state(packed: Tensor, quant_state: Any) -> Quantized:
    """The parts of `packed` (any storage dtype) and its `bitsandbytes.functional.QuantState`.

    Leading dimensions of the original shape are taken as rows. Raises ModelError for what the kernels cannot read.
    """
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise ModelError(
            "A 4-bit weight was repacked by bitsandbytes for inference on this CPU, which rounds its absmax; expected "
            "the layout that it was quantised in. Load the model again and call settle_four_bit before its first "
            "forward."
        )
    shape = (math.prod(quant_state.shape[:-1]), quant_state.shape[-1])
    nested = None
    if quant_state.nested:
        inner = quant_state.state2
        nested = NestedAbsmax(inner.absmax, inner.code, quant_state.offset, inner.blocksize)
    flat = packed.detach().reshape(-1).view(torch.uint8)
    matrix = Quantized(
        flat, quant_state.absmax, shape, quant_state.blocksize, quant_state.quant_type, quant_state.dtype, nested
    )
    if (problem := _malformed(matrix)) is not None:
        raise ModelError(
            f"A 4-bit weight of shape {tuple(quant_state.shape)}, blocksize {matrix.blocksize}: {problem}. "
            "Quantise it again with this version of bitsandbytes."
        )
    return matrix


def _malformed(q: Quantized) -> str | None:
    """What is wrong with a matrix; None if nothing."""
    if q.quant_type not in TABLE_START:
        return f"quant type {q.quant_type!r}, expected nf4 or fp4"
    if q.blocksize not in BLOCKSIZES:
        return f"expected a blocksize of {', '.join(map(str, BLOCKSIZES))}"
    elements = q.shape[0] * q.shape[1]
    blocks = cdiv(elements, q.blocksize)
    expected = [("packed", q.packed, torch.uint8, cdiv(elements, 2))]
    if q.nested is None:
        expected += [("absmax", q.absmax, torch.float32, blocks)]
    else:
        if q.nested.blocksize < 1 or q.nested.blocksize & (q.nested.blocksize - 1):
            return f"nested blocksize {q.nested.blocksize}, expected a power of two"
        expected += [
            ("absmax", q.absmax, torch.uint8, blocks),
            ("nested absmax", q.nested.absmax, torch.float32, cdiv(blocks, q.nested.blocksize)),
            ("nested code", q.nested.code, torch.float32, 256),
            ("nested offset", q.nested.offset, torch.float32, 1),
        ]
    for name, tensor, dtype, count in expected:
        if tensor.dtype != dtype or tensor.numel() != count:
            return f"{name} has {tensor.numel()} elements of {tensor.dtype}, expected {count} of {dtype}"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
        if tensor.device != q.packed.device:
            return f"{name} is on {tensor.device}, the packed weight on {q.packed.device}"
    return None


def quantize_nf4(weight: Tensor, *, blocksize: int = 64, nested: bool = True) -> Quantized:
    """Quantise weight [N, K] to NF4 by bitsandbytes, on the weight's device."""
    from bitsandbytes.functional import quantize_4bit

    if weight.dim() != 2 or weight.dtype not in FLOAT_DTYPES or blocksize not in BLOCKSIZES:
        raise ModelError(
            f"Cannot quantise a weight of shape {tuple(weight.shape)} and dtype {weight.dtype} with blocksize "
            f"{blocksize}; expected [out, in] of float32, float16 or bfloat16 and a blocksize of "
            f"{', '.join(map(str, BLOCKSIZES))}."
        )
    packed, state = quantize_4bit(
        weight.detach().contiguous(), blocksize=blocksize, compress_statistics=nested, quant_type="nf4"
    )
    return from_quant_state(packed, state)


def decoded_absmax(q: Quantized) -> Tensor:
    """[B] float32."""
    if q.nested is None:
        return q.absmax
    scale = q.nested.absmax.repeat_interleave(q.nested.blocksize)[: q.absmax.numel()]
    return q.nested.code[q.absmax.int()] * scale + q.nested.offset


def reference(q: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """[N, K], by default in the dtype of the matrix that was quantised."""
    start = TABLE_START[q.quant_type]
    table = code_tables(q.device)[start : start + 16]
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), 1)  # [256, 2]: both elements of a byte
    elements = q.shape[0] * q.shape[1]
    values = pairs[q.packed.int()].view(-1)[:elements]
    values *= decoded_absmax(q).repeat_interleave(q.blocksize)[:elements]
    return values.view(q.shape).to(q.dtype if dtype is None else dtype)


def dequantize_int8(weight: Tensor, row_absmax: Tensor, out: Tensor | None = None) -> Tensor:
    """weight [N, K] int8 times row_absmax [N] / 127, as LLM.int8() has it: by bitsandbytes.

    A `bitsandbytes.nn.Int8Params` is given as `weight.data, weight.SCB`. out: [N, K] of any float dtype and strides;
    by default float32.
    """
    from bitsandbytes.functional import int8_vectorwise_dequant

    if weight.dtype != torch.int8 or row_absmax.shape != weight.shape[:1]:
        raise ModelError(
            f"An 8-bit weight [N, K] of int8 with absmax [N] was expected, got {tuple(weight.shape)} of "
            f"{weight.dtype} with absmax {tuple(row_absmax.shape)}; pass `weight.data, weight.SCB` of an Int8Params."
        )
    values = int8_vectorwise_dequant(weight, row_absmax)
    return values if out is None else out.copy_(values)
