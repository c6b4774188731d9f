"""Trainer's arguments where the device cannot follow them."""

from __future__ import annotations

from typing import Any

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
