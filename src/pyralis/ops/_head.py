"""What the ops over a language model's head share: chunks of logits, rows without a label left out, gradients.

Shapes: T rows (tokens), R rows that reach the head, H features, V vocabulary.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyralis.ops._loss import IGNORE_INDEX
from pyralis.ops._triton import (
    at_least_float32,
    cdiv,
    gpu_of,
    launch,
    next_power_of_2,
    store_as,
    tl,
    triton,
    unsupported_tensors,
    warps_for,
)
from pyralis.ops.gemm import column_sums, gemm

GPU_CHUNK_BYTES = 512 << 20
CPU_CHUNK_BYTES = 64 << 20  # the references hold a handful of float32 copies of a chunk


@dataclass(frozen=True, slots=True)
class HeadChunks:
    """How R rows are cut: `step` rows at a time, whose logits lie in one reused buffer with rows `stride` apart."""

    rows: int
    step: int
    stride: int

    @classmethod
    def of(cls, rows: int, vocab: int, itemsize: int, chunk_bytes: int) -> HeadChunks:
        """At most chunk_bytes of logits at a time, in equal chunks: a short last one would waste the GPU."""
        stride = cdiv(vocab, 64) * 64  # aligned rows, also of an odd vocabulary
        most = max(chunk_bytes // (stride * itemsize), 1)
        grain = 128 if most >= 128 else 1  # rows of a GEMM's tile
        most -= most % grain
        step = cdiv(max(rows, 1), cdiv(max(rows, 1), most))
        return cls(rows, min(cdiv(step, grain) * grain, max(rows, 1)), stride)

    def parts(self) -> Iterator[slice]:
        for start in range(0, self.rows, self.step):
            yield slice(start, min(start + self.step, self.rows))

    @classmethod
    def for_head(cls, hidden: Tensor, weight: Tensor, chunk_bytes: int | None, *, trained: bool = False) -> HeadChunks:
        """chunk_bytes None: what pays. trained: the weight's gradient is wanted.

        Every chunk but the first reads and writes the whole of a trained weight's float32 gradient. So chunks are as
        large as the weight itself, and all rows are one chunk where their logits need no more memory than the float32
        gradient, which one chunk saves, would have needed on top of that.
        """
        size, rows, vocab = hidden.element_size(), len(hidden), len(weight)
        if chunk_bytes is None and hidden.device.type == "cpu":
            chunk_bytes = CPU_CHUNK_BYTES
        elif chunk_bytes is None:
            chunk_bytes = max(GPU_CHUNK_BYTES, weight.nbytes if trained else 0)
            saved = weight.numel() * (4 - size) if trained and gives_whole(weight.dtype) else 0
            if (whole := cls.of(rows, vocab, size, chunk_bytes + saved)).step >= rows:
                return whole
        return cls.of(rows, vocab, size, chunk_bytes)


def gives_whole(dtype: torch.dtype) -> bool:
    """Whether one chunk may give the weight's gradient in its own dtype; float16 would flush or overflow."""
    return dtype != torch.float16


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    """ValueError for shapes and dtypes that do not fit: hidden [T, H], weight [V, H], bias [V], labels [T] int64."""
    shapes = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}, labels {list(labels.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(f"{shapes}; expected [tokens, features], [vocabulary, features] and [tokens]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {list(bias.shape)} of weight {list(weight.shape)}; expected [{len(weight)}]")
    if hidden.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        dtypes = f"hidden {hidden.dtype}, weight {weight.dtype}, bias {None if bias is None else bias.dtype}"
        raise ValueError(f"{dtypes}; expected one dtype: cast them to the compute dtype first")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}; expected torch.int64")


def logit_chunks(
    chunks: HeadChunks, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits [n, V]) chunk by chunk. The next chunk overwrites the last one's logits."""
    buffer = torch.empty((chunks.step, chunks.stride), dtype=hidden.dtype, device=hidden.device)
    for part in chunks.parts():
        logits = buffer[: part.stop - part.start, : len(weight)]
        if bias is None:
            torch.mm(hidden[part], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[part], weight.t(), out=logits)
        yield part, logits


@dataclass
class HeadGradients:
    """Gradients of hidden [R, H], weight [V, H] and bias [V], summed chunk by chunk; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    _accumulate: bool = field(default=False, init=False)

    @classmethod
    def empty(
        cls, chunks: HeadChunks, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool],
        *, in_place: bool,
    ) -> HeadGradients:  # fmt: skip
        """needs: for hidden, weight, bias. in_place: hidden's gradient overwrites hidden.

        The weight's gradient is float32, except where one chunk gives all of it at once in bf16 or float32.
        """
        wide = at_least_float32(weight.dtype)
        whole = chunks.step >= chunks.rows and gives_whole(weight.dtype)
        dhidden = hidden if in_place else torch.empty_like(hidden, memory_format=torch.contiguous_format)
        return cls(
            dhidden if needs[0] else None,
            torch.empty_like(weight, dtype=weight.dtype if whole else wide) if needs[1] else None,
            torch.empty_like(bias, dtype=wide) if needs[2] and bias is not None else None,
        )

    def add(self, part: slice, dlogits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Take in dlogits [n, V] of the rows `part` of hidden."""
        if self.weight is not None:
            gemm(self.weight, dlogits.t(), hidden[part], 1.0, self._accumulate)
        if self.bias is not None:
            column_sums(dlogits, self.bias, self._accumulate)
        if self.hidden is not None:  # last, for it may overwrite hidden
            torch.mm(dlogits, weight, out=self.hidden[part])
        self._accumulate = True

    def finish(self) -> None:
        """Without any chunk the sums are zero."""
        if not self._accumulate:
            for total in (self.weight, self.bias):
                if total is not None:
                    total.zero_()


@dataclass(frozen=True, slots=True)
class SupervisedRows:
    """The rows whose label is not -100, found without the CPU waiting: R is fixed beforehand, not read."""

    index: Tensor  # [R] int64: the row of hidden that stands in each place, 0 in the unused ones
    labels: Tensor  # [R] int64: -100 in the unused places
    place: Tensor  # [T] int64: where each row of hidden stands; R for those left out
    poison: Tensor  # [] float32: 0, or NaN when there are more than R of them

    @classmethod
    def of(cls, labels: Tensor, supervised_rows: int | None) -> SupervisedRows | None:
        """None when all rows are to run: the number is not known, or its bucket leaves none out."""
        if supervised_rows is None or (R := bucket(supervised_rows)) >= len(labels):
            return None
        kept = labels != IGNORE_INDEX
        count = kept.cumsum(0)
        place = torch.where(kept, count - 1, R).clamp(max=R)
        at = torch.arange(len(labels), device=labels.device)
        index = torch.zeros(R + 1, dtype=torch.int64, device=labels.device).scatter_(0, place, at)[:R]
        rows = labels.new_full((R + 1,), IGNORE_INDEX).scatter_(0, place, labels)[:R]
        poison = torch.where(count[-1] > R, float("nan"), 0.0)
        return cls(index, rows, place, poison)


def bucket(rows: int) -> int:
    """`rows` rounded up to one of eight sizes an octave, multiples of 128: few shapes for graphs, < 1/8 wasted."""
    grain = max(128, next_power_of_2(rows) // 16)
    return cdiv(rows, grain) * grain


def scaled_rows(x: Tensor, factor: Tensor | None, dtype: torch.dtype, place: Tensor | None = None) -> Tensor:
    """out[t] = x[place[t]] * factor, zero where place[t] is len(x) ([T, N] of x [R, N]); x * factor without `place`.

    factor: [] float32, None is 1. The product is float32, rounded once to dtype; x itself if there is nothing to do.
    """
    if factor is None and place is None and x.dtype == dtype:
        return x
    T, N = len(x) if place is None else len(place), x.shape[1]
    out = torch.empty((T, N), dtype=dtype, device=x.device)
    if unsupported_tensors(x, factor, out) is None:
        block = min(1024, next_power_of_2(N))
        rows = 1024 // block
        launch(
            _scaled_rows_kernel, (cdiv(T, rows), cdiv(N, block)), x, factor, place, out, T, len(x), x.stride(0),
            out.stride(0), device=x.device, num_warps=warps_for(rows * block, per_thread=8),
            N=N, BLOCK=block, ROWS=rows,
        )  # fmt: skip
        return out
    if place is not None:
        x = torch.cat([x, x.new_zeros(1, N)]).index_select(0, place)
    return out.copy_(x if factor is None else x.to(at_least_float32(x.dtype)) * factor)


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """x *= factor ([] float32), rounded once; x is left alone, not even read, where the factor is 1."""
    if unsupported_tensors(x, factor) is None and x.is_contiguous():
        block = 4096
        programs = min(cdiv(x.numel(), block), 8 * gpu_of(x.device).sm_count)
        launch(_scale_kernel, (programs,), x, factor, x.numel(), device=x.device, num_warps=8, BLOCK=block)
    else:
        x.copy_(x.to(at_least_float32(x.dtype)) * factor)


@triton.jit(do_not_specialize=["n"])
def _scale_kernel(x, factor, n, BLOCK: tl.constexpr):
    f = tl.load(factor)
    if f != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            at = start + tl.arange(0, BLOCK)
            store_as(x + at, tl.load(x + at, mask=at < n, other=0.0).to(tl.float32) * f, at < n)


@triton.jit(do_not_specialize=["T", "R"])
def _scaled_rows_kernel(
    x, factor, place, out, T, R, x_stride, out_stride, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = row if place is None else tl.load(place + row, mask=row < T, other=0)
    mask = (row < T)[:, None] & (col < N)[None, :]
    kept = mask & (source < R)[:, None]
    value = tl.load(x + source[:, None] * x_stride + col[None, :], mask=kept, other=0.0).to(tl.float32)
    if factor is not None:
        value *= tl.load(factor)
    store_as(out + row[:, None] * out_stride + col[None, :], tl.where(kept, value, 0.0), mask)
