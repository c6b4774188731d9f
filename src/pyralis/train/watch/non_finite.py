"""Where the first value that is not finite arises in a forward and backward of stock modules.

A module's hook runs when its output is there, after those of the modules inside it. So the first hook that sees an
output that is not finite belongs to the innermost module in which it arose; where all modules inside have finite
outputs, it arose in what that module does between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyralis.train.loss import supervised_loss_sum

Stage = Literal["weight", "forward", "loss", "gradient", "nowhere"]


@dataclass(frozen=True, slots=True)
class Origin:
    """name: of the weight or module; of `gradient` the one whose output's gradient is the first that is not finite.
    words: a sentence or two about it."""

    stage: Stage
    name: str
    words: str


@dataclass(slots=True)
class _Seen:
    forward: Origin | None = None
    gradient: Origin | None = None


def find_origin(
    model: nn.Module, batch: Mapping[str, Tensor], num_items: float | None, dtype: torch.dtype = torch.float32
) -> Origin:
    """Run a batch (`input_ids`, `labels` and what else `forward` takes) and look.

    model: stock modules. dtype: to compute in, under autocast unless it is float32. num_items: what the loss is divided
    by; the batch's own number of learnt tokens if None.
    """
    broken = _broken_weight(model)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    device = batch["input_ids"].device
    with _hooks(model) as seen, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = model(**inputs, use_cache=False).logits
        if seen.forward is not None:
            return seen.forward if broken is None else _with_weight(seen.forward, broken)
        loss, count = supervised_loss_sum(logits, batch["labels"])
        loss = loss / (max(int(count), 1) if num_items is None else num_items)
        if not bool(loss.isfinite()):
            return Origin("loss", "", f"All outputs are finite, but the loss is {float(loss.detach())}.")
        loss.backward()
        found = seen.gradient or _broken_gradient(model)
    if found is not None:
        return found
    if broken is not None:
        text = f"The weight {broken} holds values that are not finite, which this batch does not use."
        return Origin("weight", broken, text)
    return Origin("nowhere", "", f"Everything is finite: the loss is {float(loss.detach()):.6g}.")


@contextmanager
def _hooks(model: nn.Module) -> Iterator[_Seen]:
    seen = _Seen()
    handles = [
        module.register_forward_hook(partial(_look, seen, name), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _look(seen: _Seen, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    if seen.forward is not None:
        return
    tensors = list(_floats(output))
    bad = next((tensor for tensor in tensors if not bool(tensor.isfinite().all())), None)
    if bad is not None:
        inputs = [tensor for tensor in _floats([args, kwargs]) if bool(tensor.isfinite().all())]
        largest = max((float(tensor.detach().abs().max()) for tensor in inputs if tensor.numel()), default=None)
        size = "" if largest is None else f" Its inputs are finite; the largest is {largest:.3g} in size."
        inside = "" if not list(module.children()) else " The modules inside it have finite outputs."
        seen.forward = Origin(
            "forward", name, f"{name or 'the model'} ({type(module).__name__}) gives {_kinds(bad)}, the first of all "
            f"in the forward.{inside}{size}",
        )  # fmt: skip
        return
    for tensor in tensors:
        if tensor.requires_grad:
            tensor.register_hook(_gradient_hook(seen, name, type(module).__name__))


def _gradient_hook(seen: _Seen, name: str, kind: str) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        if seen.gradient is None and not bool(gradient.isfinite().all()):
            seen.gradient = Origin(
                "gradient", name, f"The loss is finite. In the backward, the gradient of what {name or 'the model'} "
                f"({kind}) gives is the first with {_kinds(gradient)}: it arises in what follows that module.",
            )  # fmt: skip

    return hook


def _floats(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in it, without masks, which hold -inf on purpose and come by keyword."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if "mask" not in str(name):
                yield from _floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _floats(item)


def _kinds(tensor: Tensor) -> str:
    counts = {"NaN": int(tensor.isnan().sum()), "infinite": int(tensor.isinf().sum())}
    return (
        " and ".join(f"{count:,} {name}" for name, count in counts.items() if count) + f" of {tensor.numel():,} values"
    )


def _broken_weight(model: nn.Module) -> str | None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return next((n for n, t in tensors if t.is_floating_point() and not bool(t.detach().isfinite().all())), None)


def _with_weight(origin: Origin, weight: str) -> Origin:
    own = weight.rpartition(".")[0] == origin.name
    text = f"its own {weight.rpartition('.')[2]} holds" if own else f"the weight {weight} holds"
    return Origin("weight", weight, f"{origin.words} No wonder: {text} values that are not finite.")


def _broken_gradient(model: nn.Module) -> Origin | None:
    names = [n for n, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    if not names:
        return None
    return Origin("gradient", names[-1], f"The loss is finite, but the gradient of {names[-1]} is not.")
