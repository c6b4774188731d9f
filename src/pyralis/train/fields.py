"""Pyralis's own config fields: Firefly's, ours, and the TrainingArguments fields whose type or default we change.

The descriptions are what `pyralis config explain`, the JSON Schema and docs/config.md print.
"""

from __future__ import annotations

from os.path import expanduser
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pyralis.data.named_templates import TEMPLATES
from pyralis.train.field_types import Integer, NotSaid, NoWord, Number, OnOff

TEMPLATE_NAMES = tuple(sorted(TEMPLATES))
LEARNING_RATE = {"full": 1e-5, "lora": 2e-4, "qlora": 2e-4}

Origin = Literal["Firefly", "Pyralis", "transformers"]


def _own(default: Any, description: str, *, origin: Origin = "Pyralis", default_text: str = "", **limits: Any) -> Any:
    """A field; a function as default computes it from the fields before it, and `default_text` says how."""
    extra: dict[str, Any] = {"x-origin": origin} | ({"x-default": default_text} if default_text else {})
    if callable(default):
        return Field(default_factory=default, description=description, json_schema_extra=extra, **limits)
    return Field(default, description=description, json_schema_extra=extra, **limits)


def _output_dir(fields: dict[str, Any]) -> str:
    model = PurePath(fields["model_name_or_path"].rstrip("/\\")).name or "model"
    return f"output/{model}-{fields['task_type']}-{fields['train_mode']}"


def _known_template(name: str) -> str:
    if name and name not in TEMPLATE_NAMES:
        raise ValueError("unknown template")
    return name


class OwnFields(BaseModel):
    """Everything that is not a plain `transformers.TrainingArguments` field. Order matters: defaults look back."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=False)

    # What is trained, on what
    model_name_or_path: str = _own(..., "Model to train: a local folder or a hub name.", origin="Firefly", min_length=1)
    train_file: str | list[str] = _own(
        ...,
        "Training data: a JSONL, JSON, CSV or Parquet file, a folder searched for such files, a hub data set name, "
        "or a list of these.",
        origin="Firefly",
        min_length=1,
    )
    max_seq_length: Integer = _own(..., "Longest sequence, in tokens.", origin="Firefly", ge=2)
    task_type: Literal["sft", "pretrain", "dpo"] = _own(
        "sft", "What is learnt: answers (sft), plain text (pretrain) or preferences (dpo).", origin="Firefly"
    )
    train_mode: Literal["full", "lora", "qlora"] = _own(
        "qlora", "Train all weights, a LoRA adapter, or a LoRA adapter over 4-bit weights.", origin="Firefly"
    )
    output_dir: Annotated[str, AfterValidator(expanduser)] = _own(
        _output_dir,
        "Folder of the adapter or model, checkpoints, metrics, picture and report.",
        origin="transformers",
        default_text="output/<model>-<task>-<mode>",
        min_length=1,
    )
    overwrite_output_dir: bool = _own(False, "Start anew although output_dir already holds a run.")

    # Model
    model_revision: str | None = _own(None, "Branch, tag or commit of a hub model.")
    trust_remote_code: bool = _own(False, "Run Python code that comes with the checkpoint. Seldom works today.")
    allow_pickle_weights: bool = _own(
        False, "Also load .bin weights, which can run code when opened. Otherwise safetensors only."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _own(
        "auto", "Dtype of the compute. auto: what the machine does best. The flags bf16 and fp16 count before it."
    )
    attn_implementation: str | None = _own(
        None, "Attention of stock transformers: sdpa, eager, flash_attention_2 ... null: the model's default."
    )
    use_unsloth: bool | None = _own(
        None, "Firefly's word for the accelerated path: true is acceleration on, false is off.", origin="Firefly"
    )
    acceleration: Annotated[Literal["auto", "on", "off"], OnOff] = _own(
        lambda fields: {None: "auto", True: "on", False: "off"}[fields["use_unsloth"]],
        "Pyralis's fast path. auto: wherever it is proven for the model; on: the same, and warn where not; off: stock.",
        default_text="auto, or what use_unsloth says",
    )
    cuda_graph: Annotated[Literal["auto", "off"], OnOff] = _own(
        "auto",
        "auto: on a GPU the training steps of a fast model are recorded once and replayed; off: launched each time.",
    )
    cache_dir: str | None = _own(None, "Folder for prepared data. null: pyralis/datasets in the user's cache folder.")

    rope_scaling: Annotated[Literal["auto", "off"], OnOff] = _own(
        "auto",
        "Rotary positions. auto: scaled where a row is longer than the model was made for, and said; off: as they are.",
    )

    # Data
    template_name: Annotated[str, AfterValidator(_known_template)] = _own(
        "", "Chat template, one of Firefly's names. Empty: the tokenizer's own template.", origin="Firefly"
    )
    system: str | None = _own(None, "System text for conversations that bring none, in place of the template's.")
    data_format: Literal[
        "auto", "conversation", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference"
    ] = _own("auto", "Format of the rows. auto: recognised by their content, and said in the log.")
    loss_on: Literal["all_turns", "last_turn", "everything"] = _own(
        "all_turns", "Which tokens are learnt: every assistant turn, the last one, or all text."
    )
    on_bad_row: Literal["error", "skip"] = _own(
        "error", "A row that cannot be read, or that its format or template refuses: stop, or skip it and list it."
    )
    on_overlong: Literal["truncate", "drop", "split", "error"] = _own(
        "truncate",
        "A row longer than max_seq_length: cut it at its end, leave it out, make several of it (conversations between "
        "rounds), or stop. Rows and tokens lost are counted.",
    )
    max_data_lost: Number = _own(
        0.5,
        "Share of the rows left out, or of the tokens cut off or left out, past which the run is refused.",
        ge=0,
        le=1,
    )
    packing: bool = _own(
        lambda fields: fields["task_type"] == "pretrain",
        "Fill each row of max_seq_length with several examples, which do not see each other.",
        default_text="true for pretrain, else false",
    )
    dataset_split: str = _own("train", "Split of a hub data set.", min_length=1)
    max_samples: Integer | None = _own(None, "Use only the first so many rows.", ge=1)
    dataset_seed: Integer | None = _own(None, "Seed of the held-out split. null: seed.")
    tokenize_num_workers: Integer = _own(
        10, "Processes for tokenising, used when the data is large enough to pay.", origin="Firefly", ge=1
    )
    max_prompt_length: Integer = _own(
        512, "dpo: longest prompt, in tokens; its last ones are kept.", origin="Firefly", ge=1
    )
    beta: Number = _own(0.1, "dpo: how strongly the model is held to the reference.", origin="Firefly", gt=0)
    loss_type: Literal[
        "sigmoid", "cdpo", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
        "apo_zero", "apo_down", "aot", "aot_unpaired", "discopop",
    ] = _own("sigmoid", "dpo: the loss, by TRL's name (docs/dpo.md).")  # fmt: skip
    label_smoothing: Number = _own(
        0.0, "dpo: the chance that a preference is the wrong way round; for cdpo, robust, exo_pair and aot.", ge=0, lt=1
    )
    rpo_alpha: Number | None = _own(
        None, "dpo: weight of the chosen answers' negative log-probability, beside the loss. null: none.", ge=0
    )
    precompute_ref_log_probs: bool = _own(
        False,
        "dpo: compute the reference before training and keep it on disk, also where the model without its adapter is "
        "the reference (elsewhere it is done anyway). Pays from two epochs on.",
    )

    # Evaluation
    eval_file: str | list[str] = _own(
        "", "Evaluation data, as train_file. Giving it turns evaluation on.", origin="Firefly"
    )
    eval_split: Number = _own(0.0, "Share of the training rows held out for evaluation.", ge=0, lt=1)
    eval_strategy: Annotated[Literal["no", "steps", "epoch"], NoWord] = _own(
        lambda fields: "epoch" if fields["eval_file"] or fields["eval_split"] else "no",
        "When to evaluate.",
        origin="transformers",
        default_text="epoch where there is evaluation data, else no",
    )

    sample_prompts: list[str] | None = _own(
        None, "Questions answered greedily before and after training; the report shows both answers."
    )
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

    # TrainingArguments fields whose type or default is changed
    learning_rate: Number = _own(
        lambda fields: LEARNING_RATE[fields["train_mode"]],
        "Peak learning rate.",
        origin="transformers",
        default_text="1e-05 for full, 0.0002 for lora and qlora",
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
