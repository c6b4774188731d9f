"""The flat AdamW (`engine/optimizer.py`) in the place of one that Trainer made, where both do the same arithmetic."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from pyralis.engine.flat_parameters import flatten_parameters
from pyralis.engine.optimizer import FlatAdamW

logger = logging.getLogger(__name__)

# What else would change the arithmetic of torch's AdamW or of bitsandbytes'.
_PLAIN: dict[str, float] = {"amsgrad": False, "maximize": False, "differentiable": False}
_PLAIN_BITSANDBYTES: dict[str, float] = {"percentile_clipping": 100, "max_unorm": 0.0, "skip_zeros": False}


def flat_optimizer(optimizer: Any, model: nn.Module, max_norm: float, *, gpu_only: bool = True) -> Any:
    """A `FlatAdamW` with the parameters, groups and settings of `optimizer`, or `optimizer` itself.

    It takes over torch's AdamW (fused or not) and bitsandbytes' (32 or 8 bits, paged or not) over the float32
    parameters of adapters on one GPU; they become views of one buffer. Paged states were made for what does not fit:
    an adapter's do. Weights of the base model stay with their layers, so full fine-tuning keeps its optimizer.

    Args:
        optimizer: as Trainer made it, before its first step.
        max_norm: clip gradients to this norm; 0 clips nothing.
        gpu_only: whether to leave optimizers on a CPU alone, where nothing is gained.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    reason = _reason(optimizer, parameters, model, gpu_only)
    if reason is not None:
        logger.debug("%s stays: %s", type(optimizer).__name__, reason)
        return optimizer
    kept = ("params", "lr", "betas", "eps", "weight_decay")
    groups = [{name: group[name] for name in kept} for group in optimizer.param_groups]
    flatten_parameters(parameters)
    return FlatAdamW(groups, bits=_bits(optimizer), max_norm=max_norm or None)


def _reason(optimizer: Any, parameters: Sequence[Tensor], model: nn.Module, gpu_only: bool) -> str | None:
    if (reason := _other_arithmetic(optimizer)) is not None:
        return reason
    kinds = {(type(p.data), p.dtype, p.device) for p in parameters}
    if len(kinds) != 1:
        return "its parameters are of several kinds, or there are none"
    ((cls, dtype, device),) = kinds
    if cls is not Tensor or dtype != torch.float32:
        return f"its parameters are {cls.__name__} of {dtype}"
    if gpu_only and device.type != "cuda":
        return f"its parameters are on {device}"
    if not isinstance(model, PeftModel) or _trains_base(model):
        return "it trains weights of the base model"
    if _bits(optimizer) == 8 and _trains_embeddings(model):
        return "Trainer keeps 32 bits for embeddings"
    return None


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


def _trains_base(model: PeftModel) -> bool:
    """Whether a parameter is trained that was the base model's before the adapter came (a bias, say)."""
    prefix = getattr(model.base_model, "prefix", None)  # None of prompt learning, which has parameters of its own kind
    return not isinstance(prefix, str) or any(
        p.requires_grad and prefix not in name and ".modules_to_save." not in name
        for name, p in model.named_parameters()
    )


def _trains_embeddings(model: nn.Module) -> bool:
    return any(
        p.requires_grad for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    )
