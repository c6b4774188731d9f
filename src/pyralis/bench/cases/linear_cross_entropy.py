"""The head and its loss with their gradients, at several chunk sizes; log-probabilities of tokens; the loss alone.

`head GEMMs` are the two products without which it cannot be done, in one chunk: what the goal is a share of.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pyralis.bench.case import COMPILED, LIGER, PYRALIS, STOCK, BenchCase, Contender, ModelShape, compiled, has
from pyralis.ops._head import GPU_CHUNK_BYTES
from pyralis.ops.cross_entropy import cross_entropy_in_place
from pyralis.ops.linear_cross_entropy import linear_cross_entropy
from pyralis.ops.token_logprobs import token_logprobs

DTYPE = torch.bfloat16
GEMMS = "head GEMMs"
CHUNK_MIB = (64, 128, 256, 512, 1024)


def cases(shape: ModelShape, tokens: int) -> list[BenchCase]:
    H, V = shape.hidden, shape.vocab
    gemm = 2 * tokens * H * V
    weights, logits, rows = V * H * DTYPE.itemsize, tokens * V * DTYPE.itemsize, tokens * H * DTYPE.itemsize
    sizes = (shape, tokens)
    return [
        BenchCase("linear_cross_entropy, frozen head", *_at(sizes), partial(_frozen, *sizes), weights + rows, 2 * gemm),
        BenchCase("linear_cross_entropy, trained head", *_at(sizes), partial(_trained, *sizes), weights, 3 * gemm),
        BenchCase("token_logprobs, forward and backward", *_at(sizes), partial(_tokens, *sizes), weights, 3 * gemm),
        BenchCase("cross_entropy, both ways in place", *_at(sizes), partial(_given_logits, *sizes), 2 * logits),
    ]


def _at(sizes: tuple[ModelShape, int]) -> tuple[str, int]:
    return sizes[0].name, sizes[1]


def _inputs(shape: ModelShape, tokens: int, device: torch.device, *, trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, shape.hidden, dtype=DTYPE, device=device, requires_grad=True)
    weight = torch.randn(shape.vocab, shape.hidden, dtype=DTYPE, device=device) * shape.hidden**-0.5
    return hidden, weight.requires_grad_(trained), torch.randint(shape.vocab, (tokens,), device=device)


def _stock(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def _with_gradients(loss: Contender, *leaves: Tensor, grad: Tensor | None = None) -> Contender:
    """The loss and the gradients of `leaves`."""

    def run() -> tuple[Tensor, ...]:
        value = loss()
        assert isinstance(value, Tensor)
        return (value.detach(), *torch.autograd.grad(value, leaves, grad))

    return run


def _frozen(shape: ModelShape, tokens: int, device: torch.device) -> dict[str, Contender]:
    hidden, weight, labels = _inputs(shape, tokens, device, trained=False)
    found = _losses(hidden, weight, labels, hidden)
    for mib in CHUNK_MIB:
        if mib << 20 != GPU_CHUNK_BYTES:
            found[f"{mib} MiB"] = _with_gradients(
                partial(linear_cross_entropy, hidden, weight, labels, chunk_bytes=mib << 20), hidden
            )
    if device.type == "cuda":
        x = hidden.detach()
        logits, dx = x.new_empty(tokens, shape.vocab), torch.empty_like(x)

        def gemms() -> tuple[Tensor, Tensor]:
            return torch.mm(x, weight.t(), out=logits), torch.mm(logits, weight, out=dx)

        found[GEMMS] = gemms
    return found


def _trained(shape: ModelShape, tokens: int, device: torch.device) -> dict[str, Contender]:
    hidden, weight, labels = _inputs(shape, tokens, device, trained=True)
    return _losses(hidden, weight, labels, hidden, weight)


def _losses(hidden: Tensor, weight: Tensor, labels: Tensor, *leaves: Tensor) -> dict[str, Contender]:
    found = {
        PYRALIS: _with_gradients(partial(linear_cross_entropy, hidden, weight, labels), *leaves),
        STOCK: _with_gradients(partial(_stock, hidden, weight, labels), *leaves),
        COMPILED: _with_gradients(partial(compiled(_stock), hidden, weight, labels), *leaves),
    }
    if has("liger_kernel") and hidden.is_cuda:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found[LIGER] = _with_gradients(partial(liger_fused_linear_cross_entropy, hidden, weight, labels), *leaves)
    return found


def _tokens(shape: ModelShape, tokens: int, device: torch.device) -> dict[str, Contender]:
    hidden, weight, labels = _inputs(shape, tokens, device, trained=False)
    grad = torch.randn(tokens, device=device)

    def stock() -> Tensor:
        return -F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")

    return {
        PYRALIS: _with_gradients(partial(token_logprobs, hidden, weight, labels), hidden, grad=grad),
        STOCK: _with_gradients(stock, hidden, grad=grad),
    }


def _given_logits(shape: ModelShape, tokens: int, device: torch.device) -> dict[str, Contender]:
    logits = torch.randn(min(tokens, 4096), shape.vocab, dtype=DTYPE, device=device)
    labels = torch.randint(shape.vocab, logits.shape[:1], device=device)
    losses, scale = torch.empty(len(logits), device=device), torch.ones((), device=device)
    leaf = logits.clone().requires_grad_()

    def ours() -> tuple[Tensor, Tensor]:
        cross_entropy_in_place(logits, labels, scale, loss_out=losses)
        return losses.sum(), logits

    def stock() -> Tensor:
        return F.cross_entropy(leaf.float(), labels, reduction="sum")

    return {PYRALIS: ours, STOCK: _with_gradients(stock, leaf)}
