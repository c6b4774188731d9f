"""Pyralis's own config fields: Firefly's, ours, and the TrainingArguments fields whose type or default we change.

The descriptions are what `pyralis config explain`, the JSON Schema and docs/config.md print.
"""

from __future__ import annotations

from os.path import expanduser
from typing import Annotated, Literal

from pydantic import AfterValidator

from pyralis.train.config.data_fields import TEMPLATE_NAMES, DataFields
from pyralis.train.config.field_types import Integer, NotSaid, Number
from pyralis.train.config.own_field import own_field as _own

__all__ = ["TEMPLATE_NAMES", "OwnFields", "learning_rate"]


def learning_rate(task: str, mode: str) -> float:
    """The default for a task and a mode. Preferences take a fraction of the rate; 5e-7 for all weights is Zephyr's."""
    if task == "dpo":
        return 5e-7 if mode == "full" else 5e-6
    return 1e-5 if mode == "full" else 2e-4


class OwnFields(DataFields):
    """Everything that is not a plain `transformers.TrainingArguments` field. Order matters: defaults look back."""

    sample_prompts: list[str] | None = _own(
        None, "Questions answered greedily before and after training; the report shows both answers."
    )
    sample_at_eval: bool = _own(False, "Answer them at each evaluation too; the report shows these answers by step.")
    sample_max_new_tokens: Integer = _own(64, "Longest sample answer, in tokens.", ge=1)

    # Full fine-tuning
    bf16_update: Literal["auto", "split", "stochastic", "master"] = _own(
        "auto",
        "full: how weights learn that are computed with in bfloat16. split: their lower 16 bits are kept beside them; "
        "stochastic: rounded stochastically; master: float32 weights. auto: split with AdamW on whole weights, else "
        "master (docs/full-fine-tuning.md).",
    )
    optimizer_in_bwd: bool = _own(
        False, "full: update each layer as soon as its gradients are there, and give these up. Nothing is clipped."
    )

    # LoRA and quantisation
    lora_rank: Integer = _own(64, "Rank of the LoRA matrices.", origin="Firefly", ge=1, le=1024)
    lora_alpha: Number = _own(16, "LoRA's output is scaled by lora_alpha / lora_rank.", origin="Firefly", gt=0)
    lora_dropout: Number = _own(0.05, "Dropout before LoRA's first matrix.", origin="Firefly", ge=0, lt=1)
    lora_target_modules: Literal["all-linear"] | list[str] = _own(
        "all-linear", "Layers that get LoRA: every linear one but the head, or a list of module names.", min_length=1
    )
    lora_bias: Literal["none", "all", "lora_only"] = _own("none", "Biases that are trained beside LoRA.")
    use_rslora: bool = _own(False, "Scale by lora_alpha / sqrt(lora_rank) (rank-stabilised LoRA).")
    use_dora: bool = _own(False, "Weight-decomposed LoRA: direction and magnitude apart.")
    modules_to_save: list[str] | None = _own(
        None, "Modules trained whole and saved with the adapter, such as embed_tokens and lm_head."
    )
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = _own(
        True,
        "How LoRA starts: true (B is zero), gaussian (B is zero, A normal), orthogonal; false: random, for tests. "
        "Starts that change the base weights, such as pissa, are not offered: the adapter would not fit the base.",
    )
    load_adapter: Annotated[str, AfterValidator(expanduser)] | None = _own(
        None, "Folder of an adapter to go on training."
    )
    embedding_learning_rate: Number | None = _own(
        None, "Learning rate of embeddings and head when they are trained. null: learning_rate.", ge=0
    )
    quant_type: Literal["nf4", "fp4"] = _own("nf4", "qlora: the 4-bit data type.")
    double_quant: bool = _own(True, "qlora: quantise the scales too, 0.37 bit a weight less.")

    # A run
    on_nan: Literal["stop", "skip"] = _own(
        "stop",
        "A loss or gradient that is NaN or infinite: stop, say where, and keep the batch for `pyralis replay`; or skip "
        "that step, up to 10 in a row.",
    )
    deterministic: bool = _own(
        False,
        "The same bits from the same config, seed and machine, on a GPU too: deterministic algorithms only, which cost "
        "speed.",
    )

    # TrainingArguments fields whose type or default is changed
    learning_rate: Number = _own(
        lambda fields: learning_rate(fields.get("task_type", ""), fields.get("train_mode", "")),
        "Peak learning rate.",
        origin="transformers",
        default_text="1e-05 for full, 0.0002 for lora and qlora; for dpo 5e-07 and 5e-06",
        ge=0,
    )
    gradient_checkpointing: Annotated[
        bool | Literal["auto", "full"], AfterValidator(lambda value: "auto" if value is True else value)
    ] = _own(
        "auto",
        "Recompute activations in the backward pass. true and auto: as much as memory demands; full: every layer; "
        "false: never.",
        origin="transformers",
    )
    resume_from_checkpoint: Annotated[bool | str, NotSaid] = _own(
        "auto",
        "auto: go on from the newest whole checkpoint in output_dir if there is one; true: there must be one; false: "
        "never, so an unfinished run there is refused; or a checkpoint folder.",
        origin="transformers",
    )
    logging_steps: Number = _own(
        10, "Log every so many steps; below 1: a share of all steps.", origin="transformers", gt=0
    )
    report_to: str | list[str] = _own(
        "none", "Also log to tensorboard, wandb, swanlab ... ; metrics.jsonl is always written.", origin="transformers"
    )
    disable_tqdm: bool = _own(True, "Hide transformers' progress bar; Pyralis has its own.", origin="transformers")
    remove_unused_columns: bool = _own(
        False, "Drop columns that the model's forward does not name.", origin="transformers"
    )
    logging_nan_inf_filter: bool = _own(
        False, "Hide NaN and infinite losses from the log. They should be seen, and the check stalls the GPU.",
        origin="transformers",
    )  # fmt: skip
