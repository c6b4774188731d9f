"""Model FLOPs utilisation (Chowdhery et al., PaLM, 2022, appendix B): of what a GPU's data sheet promises, the share
that goes into the model's own products.

Counted are, for each token, 4 operations a weight (2 forward, 2 for the gradient of the input) and 2 more for each
weight that is trained. Not counted: attention's products, which grow with the length, embedding look-ups, what is
computed again in the backward pass, and padding. A frozen model is not credited with gradients that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyralis.memory.gpus import known_gpu

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def flops_per_token(model: Any) -> float | None:
    """Floating-point operations of training on one token; None for a mixture of experts, of which each token meets few.

    model: a causal LM, adapters attached.
    """
    if any(getattr(model.config.get_text_config(), name, None) for name in _EXPERTS):
        return None
    head = model.get_output_embeddings()
    multiplied = set() if head is None else {id(p) for p in head.parameters()}
    looked_up = {id(p) for p in model.get_input_embeddings().parameters()} - multiplied
    operations = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in looked_up or ".original_module." in name:  # PEFT trains a copy in its place
            continue
        state = getattr(parameter, "quant_state", None)  # of 4-bit weights, which lie packed
        weights = state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
        operations += weights * (6 if parameter.requires_grad else 4)
    return float(operations)


def mfu_of(model: Any, device: torch.device, dtype: torch.dtype, world_size: int) -> Callable[[float], float] | None:
    """From tokens per second over all processes to the share of their GPUs' peak. None where there is no such peak: a
    CPU, float32, a GPU that the table does not know; or no such count."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    properties = torch.cuda.get_device_properties(device)
    gpu, flops = known_gpu(properties.name, properties.total_memory), flops_per_token(model)
    if gpu is None or flops is None:
        return None
    peak = gpu.half * 1e12 * world_size
    return lambda tokens_per_second: tokens_per_second * flops / peak
