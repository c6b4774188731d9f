"""float16 without loss scaling, which learns less than it should and says nothing."""

from __future__ import annotations

import torch
from torch import nn

from pyralis.train.module_walk import parameters_of
from pyralis.train.old_trainer_names import say_once


def warn_of_lost_gradients(mixed_precision: str, model: nn.Module) -> None:
    """`TrainingArguments()` has it so for a model that was loaded in float16. Said once.

    mixed_precision: the accelerator's, which `accelerate launch --mixed_precision` chooses, too; "no" if it is off.
    """
    if mixed_precision != "no" or not any(p.dtype == torch.float16 for p in parameters_of(model)):
        return
    say_once(
        "The model computes in float16 and its loss is not scaled: gradients below 6e-8 are lost. `fp16=True` scales "
        "it (what is trained has to be float32, as PEFT's adapters are). bfloat16, with `bf16=True` and on GPUs from "
        "Ampere on, needs no scaling."
    )
