"""What our subclasses of TRL's trainers share: old argument names, the fast path, adapters that stay float32."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from pyralis.compat import demand_checkpointing, rename_checkpointing
from pyralis.errors import DataError
from pyralis.memory.auto import follow_plan, forget_plan
from pyralis.models.causal_lm import causal_lm_of
from pyralis.models.checkpointing import choose_save_policy
from pyralis.models.dtype import choose_device, choose_dtype
from pyralis.models.surgery import accelerate, decoder_layers
from pyralis.models.swap import fast_modules, is_fast
from pyralis.train.arguments import LeanArguments
from pyralis.train.lean import LeanTrainer
from pyralis.train.old_trainer_names import TrainerCall, say_once, todays_call


@dataclass
class TrlConfig(LeanArguments):
    """Fields of ours beside those of one of TRL's configs, before which it stands in the list of bases."""

    acceleration: str = field(
        default="auto",
        metadata={
            "help": "Whether the model's layers are made fast: auto, on or off.",
            "choices": ["auto", "on", "off"],
        },
    )

    def __post_init__(self) -> None:
        """Without `bf16` and `fp16`: what the device computes in. TRL takes bfloat16 anywhere, on a CPU at 15 times
        the cost, and on a GPU before Ampere it raises."""
        given: Any = self
        if given.bf16 is None and not given.fp16:
            device = torch.device("cpu") if given.use_cpu else choose_device()
            dtype = choose_dtype("auto", device).dtype
            given.bf16, given.fp16 = dtype == torch.bfloat16, dtype == torch.float16
            # transformers refuses bf16 without a GPU unless it is told that the CPU is meant
            given.use_cpu = given.use_cpu or (given.bf16 and device.type == "cpu")
        rename_checkpointing(given)
        super().__post_init__()  # type: ignore[misc]


class TrlTrainer(LeanTrainer):
    """Before one of TRL's trainers in the list of bases. Subclasses say which, and which config it has.

    - Old arguments are taken (`old_trainer_names.py`), and what became of them is said once.
    - The model is made fast unless it is already (`acceleration` of the config).
    - Trained parameters keep their dtype. TRL casts those of a quantised model to bfloat16, in which small updates are
      lost, and which a GradScaler refuses.
    """

    trl_trainer: ClassVar[type]
    trl_config: ClassVar[type[TrainingArguments]]

    def __init__(self, *positional: Any, **given: Any) -> None:
        names = list(inspect.signature(self.trl_trainer.__init__).parameters)[1:]  # type: ignore[misc]
        given = dict(zip(names, positional)) | given
        call = todays_call(self.trl_trainer, self.trl_config, given.pop("args", None), given)
        for note in (*call.notes, *self.adapt(call)):
            say_once(f"{type(self).__name__}: {note}")
        callbacks = [*(call.arguments.pop("callbacks", None) or ()), _AccelerateModel()]
        before = trained_data(call.arguments.get("model"))
        super().__init__(args=call.args, callbacks=callbacks, **call.arguments)
        self.remove_callback(_AccelerateModel)
        keep_dtypes(self.model, before)

    def adapt(self, call: TrainerCall) -> tuple[str, ...]:
        """Change what TRL's trainer is called with; returns what to say of it."""
        return ()


class _AccelerateModel(TrainerCallback):
    """Makes the model fast when Trainer has it, adapters and all, and before TRL wraps its forward.

    Checkpointing, which TRL has on by default, is then as much as memory demands.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        mode: Any = getattr(args, "acceleration", "auto")
        if mode != "off" and next(fast_modules(model), None) is None:
            accelerate(model, mode)
            if args.gradient_checkpointing and is_fast(causal := causal_lm_of(model)):
                follow_plan(causal)
        if getattr(args, "activation_offloading", False) and next(fast_modules(model), None) is not None:
            args.activation_offloading = False
            demand_checkpointing(args)
            forget_plan(causal_lm_of(model))
            choose_save_policy(decoder_layers(model), "offload_input")
            say_once(
                "activation_offloading: the inputs of layers wait in pinned host memory, the rest is computed anew, as "
                "use_gradient_checkpointing='unsloth' has it. TRL's own offloading is not used: it copies more."
            )


def first_row(rows: Any, columns: Sequence[str] = ()) -> Any:
    """The first row of a data set or stream. Raises DataError where there is none, or it has none of `columns`."""
    row = next(iter(rows), None)
    if row is None:
        raise DataError("train_dataset: there is no row in it.")
    if columns and isinstance(row, Mapping) and not set(columns) & set(row):
        raise DataError(
            f"train_dataset has the columns {', '.join(row) or 'of nothing'}; expected one of "
            f"{', '.join(dict.fromkeys(columns))}. Name the column of the text with dataset_text_field, or give a "
            "formatting_func."
        )
    return row


def trained_data(model: Any) -> dict[int, Tensor]:
    """Where the trained parameters lie, by the `id` of each."""
    if not isinstance(model, nn.Module):
        return {}
    return {id(p): p.data for p in model.parameters() if p.requires_grad}


def keep_dtypes(model: Any, before: dict[int, Tensor]) -> None:
    """Give trained parameters of a quantised model, cast to bfloat16 meanwhile, the memory that they had before (with
    all its digits), or if they are new float32."""
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            data = before.get(id(parameter))
            parameter.data = parameter.data.float() if data is None else data
