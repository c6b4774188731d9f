"""TRL's SFTTrainer on the fast path, called as today or as by older scripts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import trl
from datasets import Dataset
from torch import nn

from pyralis.models.causal_lm import head_reason
from pyralis.train.fast_loss import FastLossTrainer
from pyralis.train.formatting import of_one_row
from pyralis.train.old_trainer_names import TrainerCall, say_once
from pyralis.train.trl_trainer import TrlConfig, TrlTrainer, first_row

# What TRL reads a row from, besides the column that dataset_text_field names.
_COLUMNS = ("messages", "conversations", "prompt", "completion", "input_ids")


@dataclass
class SFTConfig(TrlConfig, trl.SFTConfig):
    """`trl.SFTConfig` with fields of ours. `bf16` defaults to what the device computes in."""

    max_seq_length: int | None = field(default=None, metadata={"help": "The old name of max_length."})
    token_metrics: bool = field(
        default=False,
        metadata={
            "help": "Log entropy and mean_token_accuracy, as TRL does. Its own loss is then used, and waited for."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_seq_length is not None:
            say_once("SFTConfig(max_seq_length=...) is called max_length= today")
            self.max_length, self.max_seq_length = self.max_seq_length, None


class SFTTrainer(TrlTrainer, FastLossTrainer, trl.SFTTrainer):
    """`trl.SFTTrainer` with the same losses, whose training goes through the fused layers and head.

    The loss is `causal_lm_loss`: exact, without stored logits, rows that are not learnt left out of the head. TRL's own
    loss is used where it does more (`token_metrics`, DFT, a `compute_loss_func`, `compute_metrics`, mixture of experts,
    images). Logged are the loss and `num_tokens`.
    """

    trl_trainer = trl.SFTTrainer
    trl_config = SFTConfig

    def __init__(self, *positional: Any, **given: Any) -> None:
        super().__init__(*positional, **given)
        note_double_bos(self.train_dataset, self.processing_class)

    def adapt(self, call: TrainerCall) -> tuple[str, ...]:
        function, rows = call.arguments.get("formatting_func"), call.arguments.get("train_dataset")
        if rows is not None:
            row = first_row(rows, () if function is not None else (call.args.dataset_text_field, *_COLUMNS))
            if function is not None:
                call.arguments["formatting_func"] = of_one_row(function, row)
        unknown = set(call.args.dataset_kwargs or {}) - {"skip_prepare_dataset"}
        return tuple(f"dataset_kwargs[{name!r}] has no effect" for name in sorted(unknown))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs or "labels" not in inputs or self.loss_reason(model) is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self.fast_loss(model, inputs, num_items_in_batch, self.args.label_smoothing_factor)
        return self.over_processes(loss, num_items_in_batch)

    def loss_reason(self, model: nn.Module) -> str | None:
        """Why TRL's own loss is used; None if it is not."""
        settings: Any = self.args
        if settings.token_metrics:
            return "token_metrics"
        if settings.loss_type != "nll" or self.compute_loss_func is not None:
            return "another loss was asked for"
        if self.aux_loss_enabled or self._is_vision_dataset:
            return "experts are balanced, or there are images"
        if (parallel := self.accelerator.parallelism_config) is not None and (
            parallel.cp_enabled or parallel.sp_enabled
        ):
            return "sequences are split over processes"
        reason = head_reason(model)
        return None if reason is None else str(reason)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.setdefault("num_tokens", self.token_counts.total)
        super().log(logs, start_time)


# The names of Unsloth's.
UnslothTrainer = SFTTrainer
UnslothTrainingArguments = SFTConfig


def note_double_bos(dataset: Any, tokenizer: Any) -> None:
    """Say it if texts begin with the token that the tokenizer puts before them again."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    if any(list(row[:2]) == [bos, bos] for row in dataset[:8]["input_ids"]):
        say_once(
            f"rows begin with two {tokenizer.bos_token!r}: the text has one already, and the tokenizer adds another. "
            "The model has never seen two. Take it out of the text, or give the trainer messages instead of text."
        )
