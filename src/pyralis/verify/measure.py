"""One pass over one batch: the loss, each token's share of it, and the gradient of every trained parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyralis.data.tokenize import IGNORE
from pyralis.models.causal_lm import causal_lm_loss
from pyralis.verify.batches import Batch
from pyralis.verify.exact import exact

# float16 loses gradients below 6e-8: the loss is scaled, as by GradScaler, with the largest of these that overflows
# nowhere.
LOSS_SCALES = (2.0**14, 2.0**10, 2.0**6, 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """loss: the mean over learnt tokens. token_losses: [n], of each of them. gradients: by the parameter's name."""

    loss: float
    token_losses: Tensor
    gradients: dict[str, Tensor]


def measure_truth(model: nn.Module, batch: Batch, dtype: torch.dtype = torch.float64) -> Outcome:
    """Of stock transformers in `dtype`. The model is stock."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with exact(model, dtype) as truth:
        losses = _token_losses(model, batch)
        losses.mean().backward()
    model.zero_grad(set_to_none=True)
    gradients = {names[key]: gradient for key, gradient in truth.gradients.items()}
    return Outcome(losses.mean().item(), losses.detach(), gradients)


def measure_stock(model: nn.Module, batch: Batch, dtype: torch.dtype, *, moved: int | None = None) -> Outcome:
    """As a Trainer runs it: half precision under autocast, logits and loss in float32.

    moved: a seed; embeddings are then moved by up to half a step of `dtype`, so that all else is rounded another way.
    """

    def forward() -> tuple[Tensor, Tensor]:
        losses = _token_losses(model, batch)
        return losses.mean(), losses.detach()

    with nullcontext() if moved is None else _moved_embeddings(model, dtype, moved):
        return _measured(model, batch, dtype, forward)


def measure_fast(model: nn.Module, batch: Batch, dtype: torch.dtype) -> Outcome:
    """As Pyralis trains: the loss without stored logits. The tokens' losses come from a second forward's logits."""

    def forward() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            losses = _token_losses(model, batch)
        return causal_lm_loss(model, batch.inputs, batch.labels), losses

    return _measured(model, batch, dtype, forward)


def _measured(
    model: nn.Module, batch: Batch, dtype: torch.dtype, forward: Callable[[], tuple[Tensor, Tensor]]
) -> Outcome:
    for scale in LOSS_SCALES if dtype == torch.float16 else (1.0,):
        model.zero_grad(set_to_none=True)
        with _autocast(batch.labels.device, dtype):
            loss, losses = forward()
        (loss * scale).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if all(bool(gradient.isfinite().all()) for gradient in found.values()):
            break
    gradients = {name: gradient / scale for name, gradient in found.items()}  # a copy: fast ones are views of a buffer
    model.zero_grad(set_to_none=True)
    return Outcome(loss.item(), losses, gradients)


@contextmanager
def _moved_embeddings(model: Any, dtype: torch.dtype, seed: int) -> Iterator[None]:
    generator = torch.Generator().manual_seed(seed)

    def move(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        places = torch.rand(output.shape, generator=generator).to(output.device) - 0.5
        return (output.float() * (1 + torch.finfo(dtype).eps * places)).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def _token_losses(model: Any, batch: Batch) -> Tensor:
    """[n] in float32 or wider, by torch's own cross entropy from the model's logits."""
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
    labels = batch.labels[:, 1:]
    kept = labels != IGNORE
    rows = logits[kept]
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, labels[kept], reduction="none")


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype) if dtype in (torch.bfloat16, torch.float16) else nullcontext()
