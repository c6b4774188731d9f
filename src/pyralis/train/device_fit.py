"""Trainer's arguments where the device cannot follow them."""

from __future__ import annotations

from typing import Any

import torch

from pyralis.errors import ConfigError
from pyralis.models.dtype import choose_dtype

# What bitsandbytes' optimizers would do on a GPU, with states in 32 bits.
CPU_OPTIMIZERS = dict.fromkeys(
    ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit"), "adamw_torch"
)


def fit_to_device(args: Any) -> tuple[str, ...]:
    """Change in `TrainingArguments` what a CPU cannot follow; returns what became of it, a line each."""
    if args.device.type != "cpu":
        return ()
    args.dataloader_pin_memory = False  # torch warns of it
    notes = []
    if args.fp16:
        args.fp16 = False
        notes.append("fp16 needs a GPU; float32 is computed here")
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in CPU_OPTIMIZERS:
        args.optim = CPU_OPTIMIZERS[optim]
        notes.append(f"optim: {optim} needs a GPU; {args.optim} does the same here")
    return tuple(notes)


def check_gpu(args: Any, model: Any) -> None:
    """What transformers lets pass: it asks for bfloat16 where a GPU emulates it, at a multiple of the time and without
    a fused attention; and a model that a device map has put on another GPU would get its batches on this one.

    Raises:
        ModelError: `args.bf16` on a GPU without bfloat16 (V100, T4).
        ConfigError: the whole model is on another GPU than `args.device`.
    """
    device: torch.device = args.device
    if device.type != "cuda":
        return
    if args.bf16 or args.bf16_full_eval:
        choose_dtype("bfloat16", device)
    places = set((getattr(model, "hf_device_map", None) or {}).values()) - {"disk"}
    placed = {torch.device("cuda", place) if isinstance(place, int) else torch.device(place) for place in places}
    if len(placed) == 1 and (place := placed.pop()).type == "cuda" and place.index not in (None, device.index):
        raise ConfigError(
            f"The model is on {place}, this process trains on {device}: load it without device_map, and start with "
            f"CUDA_VISIBLE_DEVICES={place.index} to train on that GPU."
        )
