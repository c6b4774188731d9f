"""How all weights are trained: what `bf16_update` and `optimizer_in_bwd` come to, and which fields go with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pyralis.errors import ConfigError
from pyralis.train.config.findings import Finding, note, unused

if TYPE_CHECKING:
    from pyralis.train.config.train_config import TrainConfig

FLAT_OPTIMIZERS = frozenset(
    {
        "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw", "paged_adamw_32bit",
        "paged_adamw_8bit",
    }
)  # fmt: skip
"""Those that the flat AdamW stands in for."""


def bf16_update(config: TrainConfig) -> Literal["split", "stochastic", "master"]:
    """How bfloat16 weights are kept; `auto` is `split` wherever the flat AdamW trains a whole model."""
    if config.bf16_update != "auto":
        return config.bf16_update
    flat = str(config.optim) in FLAT_OPTIMIZERS and not (config.deepspeed or config.fsdp)
    return "split" if flat else "master"


def bytes_per_parameter(config: TrainConfig) -> int:
    """Of weights, gradients and AdamW's states, where all weights are trained in bfloat16."""
    weights = {"stochastic": 2, "split": 2 + 2, "master": 4}[bf16_update(config)]
    gradients = 0 if config.optimizer_in_bwd else 4 if bf16_update(config) == "master" else 2
    return weights + gradients + (2 if "8bit" in str(config.optim) else 8)


def full_rule(config: TrainConfig) -> Iterator[Finding]:
    if config.train_mode != "full":
        yield from unused(config, ("bf16_update", "optimizer_in_bwd"), f"train_mode is {config.train_mode}")
        return
    for field, chosen in (
        ("bf16_update", config.bf16_update in ("split", "stochastic")), ("optimizer_in_bwd", config.optimizer_in_bwd)
    ):  # fmt: skip
        if not chosen:
            continue
        value = str(getattr(config, field)).lower()
        if str(config.optim) not in FLAT_OPTIMIZERS:
            yield Finding(
                (field, "optim"),
                f"{field}: {value} is for AdamW, not for optim: {config.optim}; expected one of "
                f"{', '.join(sorted(FLAT_OPTIMIZERS))}.",
            )
        if shard := "deepspeed" if config.deepspeed else "fsdp" if config.fsdp else None:
            yield Finding(
                (field, shard), f"{field}: {value} needs whole weights in each process; {shard} cuts them up."
            )
    if config.optimizer_in_bwd:
        yield from _steps_in_backward(config)


def _steps_in_backward(config: TrainConfig) -> Iterator[Finding]:
    if config.gradient_accumulation_steps != 1:
        yield Finding(
            ("optimizer_in_bwd", "gradient_accumulation_steps"),
            "optimizer_in_bwd: true makes each backward a step, so gradient_accumulation_steps: "
            f"{config.gradient_accumulation_steps} is not possible; set it to 1.",
        )
    if config.fp16:
        yield Finding(
            ("optimizer_in_bwd", "fp16"),
            "optimizer_in_bwd: true does not go with fp16: true, which may have to skip a step and knows it too late; "
            "use bf16.",
        )
    if not config.max_grad_norm:
        return
    if "max_grad_norm" in config.model_fields_set:
        yield Finding(
            ("optimizer_in_bwd", "max_grad_norm"),
            f"optimizer_in_bwd: true cannot clip (max_grad_norm: {config.max_grad_norm}): the norm of all gradients is "
            "known only when the first of them are gone; set max_grad_norm to 0.",
        )
    else:
        yield note("optimizer_in_bwd", message="optimizer_in_bwd: true: gradients are not clipped.")


def check_steps_in_backward(args: Any, replicated: bool) -> None:
    """Raise ConfigError for what an optimizer that steps in the backward cannot do.

    args: `TrainingArguments`. replicated: whether each process has the whole model.
    """
    problems = {
        f"gradient_accumulation_steps is {args.gradient_accumulation_steps}, but each backward is a step: set it to 1":
            args.gradient_accumulation_steps != 1,
        f"max_grad_norm is {args.max_grad_norm}, but the norm of all gradients is known only when the first of them "
        "are gone: set it to 0": bool(args.max_grad_norm),
        "fp16 may have to skip a step, which is known too late: use bf16": args.fp16,
        f"{args.world_size} processes would have to exchange gradients before each update: train in one":
            args.world_size > 1,
        "the model is sharded over processes": not replicated,
    }  # fmt: skip
    if found := [problem for problem, holds in problems.items() if holds]:
        raise ConfigError("optimizer_in_bwd: " + "; ".join(found) + ". Or set optimizer_in_bwd to false.")
