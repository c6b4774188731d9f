"""The flat AdamW (`engine/optimizer.py`) in the place of one that Trainer made: for adapters on a GPU, where it does
the same arithmetic in one launch, and for weights in bfloat16, where rounding to nearest would lose small updates."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from pyralis.engine.backward_optimizer import BackwardAdamW
from pyralis.engine.flat_parameters import flatten_parameters
from pyralis.engine.optimizer import FlatAdamW, Rounding
from pyralis.errors import ConfigError
from pyralis.models.gradients import FlatGradients
from pyralis.models.surgery import fused_weights

logger = logging.getLogger(__name__)

# What else would change the arithmetic of torch's AdamW or of bitsandbytes'.
_PLAIN: dict[str, float] = {"amsgrad": False, "maximize": False, "differentiable": False}
_PLAIN_BITSANDBYTES: dict[str, float] = {"percentile_clipping": 100, "max_unorm": 0.0, "skip_zeros": False}


def flat_optimizer(
    optimizer: Any,
    model: nn.Module,
    max_norm: float,
    *,
    rounding: Rounding = "split",
    seed: int = 0,
    in_backward: bool = False,
    gpu_only: bool = True,
) -> Any:
    """A `FlatAdamW` with the parameters, groups and settings of `optimizer`, or `optimizer` itself.

    It takes over torch's AdamW (fused or not) and bitsandbytes' (32 or 8 bits, paged or not) over the float32
    parameters of adapters on one GPU, and over bfloat16 parameters of any model anywhere; they become views of one
    buffer. Paged states stay so for weights of the base model; an adapter's fit. float32 weights of the base model keep
    their optimizer, unless it is to step in the backward.

    Args:
        optimizer: as Trainer made it, before its first step.
        max_norm: clip gradients to this norm; 0 clips nothing.
        rounding: of bfloat16 parameters (`ops/adamw.py`); "nearest" leaves them to their optimizer.
        seed: of stochastic rounding.
        in_backward: a `BackwardAdamW`, whatever is trained.
        gpu_only: whether to leave float32 optimizers on a CPU alone, where nothing is gained.

    Raises:
        ConfigError: `in_backward`, and the optimizer is of a kind that cannot.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    reason = _reason(optimizer, parameters, model, rounding, gpu_only and not in_backward, in_backward)
    if reason is not None:
        if in_backward:
            raise ConfigError(f"optimizer_in_bwd: AdamW can step in the backward, not {_name(optimizer)}: {reason}.")
        if rounding != "nearest" and any(p.dtype == torch.bfloat16 for p in parameters):
            logger.warning(
                "bfloat16 weights are updated by %s, which rounds to nearest and so loses updates below 0.2 %% of a "
                "weight: %s. Train in float32, or with AdamW.", _name(optimizer), reason,
            )  # fmt: skip
        logger.debug("%s stays: %s", _name(optimizer), reason)
        return optimizer
    kept = ("params", "lr", "betas", "eps", "weight_decay")
    groups = [{name: group[name] for name in kept} for group in optimizer.param_groups]
    base = trains_base(model)
    settings: dict[str, Any] = {
        "bits": _bits(optimizer), "in_32_bits": _embeddings(model) if _bits(optimizer) == 8 else (),
        "paged": base and _is_paged(optimizer), "seed": seed,
        "rounding": rounding if parameters[0].dtype == torch.bfloat16 else "nearest",
    }  # fmt: skip
    if in_backward:
        return BackwardAdamW(groups, parts=_flatten(model, parameters), **settings)
    return flat_adamw(model, groups, max_norm=max_norm or None, **settings)


def flat_adamw(
    model: nn.Module, params: Sequence[nn.Parameter] | Sequence[dict[str, Any]], **settings: Any
) -> FlatAdamW:
    """A `FlatAdamW` over parameters of `model`, which become views of one buffer; the model's fused layers write their
    gradients into its own, from where they need not be copied. params, settings: as `FlatAdamW` takes them."""
    parameters = [p for one in params for p in (one["params"] if isinstance(one, dict) else (one,))]
    layers = _flatten(model, parameters)
    flat = FlatAdamW(params, **settings)
    if layers and (weights := fused_weights(model)) is not None:
        weights.use_gradients(FlatGradients(parameters, flat.grad_views))
    return flat


@contextmanager
def steps_in_backward(optimizer: Any, model: nn.Module) -> Iterator[None]:
    """While a `BackwardAdamW` trains `model`: every backward is a step. Does nothing with another optimizer."""
    if not isinstance(optimizer, BackwardAdamW):
        yield
        return
    optimizer.attach()
    if (weights := fused_weights(model)) is not None:
        weights.use_gradients(FlatGradients(*optimizer.placed, take=optimizer.take))
    try:
        yield
    finally:
        optimizer.detach()
        if weights is not None:
            weights.use_gradients(None)


def trains_base(model: nn.Module) -> bool:
    """Whether a parameter is trained that was the base model's before an adapter came (a bias, say)."""
    if not isinstance(model, PeftModel):
        return True
    prefix = getattr(model.base_model, "prefix", None)  # None of prompt learning, which has parameters of its own kind
    return not isinstance(prefix, str) or any(
        p.requires_grad and prefix not in name and ".modules_to_save." not in name
        for name, p in model.named_parameters()
    )


def _flatten(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Sequence[nn.Parameter]]:
    """Move them into one buffer, those of a fused layer side by side, as its products need them; returns the layers'.

    Layers first give up the buffers of their own: nothing is held twice for longer than it takes to move.
    """
    weights, wanted = fused_weights(model), {id(p) for p in parameters}
    layers: list[Sequence[nn.Parameter]] = []
    if weights is not None:
        layers = [[p for p in layer.parameters if id(p) in wanted] for layer in weights.layers if layer.served]
        weights.release()
    layers = [layer for layer in layers if layer]
    inside = {id(p) for layer in layers for p in layer}
    flatten_parameters([*(p for layer in layers for p in layer), *(p for p in parameters if id(p) not in inside)])
    return layers


def _reason(
    optimizer: Any, parameters: Sequence[Tensor], model: nn.Module, rounding: Rounding, gpu_only: bool, any_model: bool
) -> str | None:
    if (reason := _other_arithmetic(optimizer)) is not None:
        return reason
    kinds = {(type(p.data), p.dtype, p.device) for p in parameters}
    if len(kinds) != 1:
        return "its parameters are of several kinds, or there are none"
    ((cls, dtype, device),) = kinds
    if cls is not Tensor or dtype not in (torch.float32, torch.bfloat16):
        return f"its parameters are {cls.__name__} of {dtype}"
    if dtype == torch.bfloat16:
        return "rounding to nearest is asked for" if rounding == "nearest" and not any_model else None
    if gpu_only and device.type != "cuda":
        return f"its parameters are on {device}"
    return "it trains weights of the base model" if trains_base(model) and not any_model else None


def _other_arithmetic(optimizer: Any) -> str | None:
    if type(optimizer) is torch.optim.AdamW:
        expected, settings = _PLAIN, optimizer.param_groups
    elif type(optimizer).__module__.startswith("bitsandbytes.optim.adamw"):
        expected, settings = _PLAIN_BITSANDBYTES, [vars(optimizer.args)]
    else:
        return "it is no AdamW"
    for group in settings:
        for name, value in expected.items():
            if group.get(name, value) != value:
                return f"{name} is {group[name]}"
    if len({(tuple(group["betas"]), group["eps"]) for group in optimizer.param_groups}) > 1:
        return "its groups differ in betas or eps"
    return None


def _bits(optimizer: Any) -> int:
    return getattr(getattr(optimizer, "args", None), "optim_bits", 32)


def _is_paged(optimizer: Any) -> bool:
    return bool(getattr(optimizer, "is_paged", False))


def _embeddings(model: nn.Module) -> list[Tensor]:
    """What Trainer has bitsandbytes keep in 32 bits."""
    return [p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()]


def _name(optimizer: Any) -> str:
    return type(optimizer).__name__
