"""A model put into training or inference, and what `use_gradient_checkpointing` means."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyralis.api.notice import notice
from pyralis.api.origin import Checkpointing, base_of, origin_of, set_origin
from pyralis.compat import switch_checkpointing
from pyralis.errors import ModelError
from pyralis.memory.auto import follow_plan, forget_plan
from pyralis.models.checkpointing import choose_save_policy
from pyralis.models.host_embedding import embedding_to_host
from pyralis.models.policy import SavePolicy
from pyralis.models.surgery import decoder_layers
from pyralis.models.swap import is_fast

# What a fast layer keeps for its backward (docs/fused-layer.md); None: what the memory plan says (docs/plan.md).
POLICIES: dict[Checkpointing, SavePolicy | None] = {
    "unsloth": "offload_input",
    "auto": None,
    True: "recompute_layer",
    False: "keep",
}


def check_choice(choice: Any) -> None:
    """Raise ModelError unless `use_gradient_checkpointing` may be that."""
    if choice not in tuple(POLICIES):
        raise ModelError(f'use_gradient_checkpointing is {choice!r}; expected True, False, "unsloth" or "auto".')


def set_checkpointing(model: Any, choice: Checkpointing) -> None:
    """Follow `choice` in training from now on, whatever a trainer's own switch says later.

    Raises:
        ModelError: none of True, False, "unsloth" and "auto".
    """
    check_choice(choice)
    base, policy = base_of(model), POLICIES[choice]
    forget_plan(base)
    choose_save_policy(decoder_layers(base), policy)
    if policy is None:
        follow_plan(base)
    set_origin(model, replace(origin_of(model), checkpointing=choice))
    checkpointed = _checkpoints_stock(base) if policy is None else policy != "keep"
    if not base.supports_gradient_checkpointing:
        if checkpointed:
            notice(f"use_gradient_checkpointing has no effect: {type(base).__name__} does not support it")
        return
    # The switch hooks the embedding so that reentrant checkpoints see a gradient, and hooks it anew each time. Without
    # reentrance there is no need, and the hook could not be pickled.
    base.disable_input_require_grads()
    switch_checkpointing(base, checkpointed)
    base.disable_input_require_grads()


def _checkpoints_stock(base: Any) -> bool:
    """Whether layers that no plan is made for are checkpointed: on a GPU, whose memory is scarce."""
    return base.device.type == "cuda" and not all(map(is_fast, decoder_layers(base)))


def offload_embedding(model: Any) -> None:
    """Move the embedding of a model with an adapter to host memory if that was asked for; what forbids it is said."""
    if not origin_of(model).offload_embedding:
        return
    try:
        freed = embedding_to_host(base_of(model))
    except ModelError as error:
        notice(str(error))
    else:
        if freed:
            notice(f"the embedding is in host memory: {freed / 2**30:.2f} GiB of the GPU are free for other things")


def for_training(model: Any, use_gradient_checkpointing: Checkpointing | None = None) -> Any:
    """Put `model` into training: dropout on, layers recomputed as asked for, padding on the right. Returns it.

    use_gradient_checkpointing: None is what was asked for last.
    """
    origin = origin_of(model)
    set_checkpointing(model, origin.checkpointing if use_gradient_checkpointing is None else use_gradient_checkpointing)
    model.train()
    if origin.tokenizer is not None:
        origin.tokenizer.padding_side = "right"
    return model


def for_inference(model: Any) -> Any:
    """Put `model` into inference: no dropout, a KV cache, padding on the left as batched `generate` needs it.

    Returns it. `generate` works in training mode too, where dropout is on.
    """
    base_of(model).config.use_cache = True
    model.eval()
    tokenizer = origin_of(model).tokenizer
    if tokenizer is not None:
        tokenizer.padding_side = "left"
    return model
