"""Config fields about model and data: what is trained, on what, and what is evaluated."""

from __future__ import annotations

from os.path import expanduser
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from pyralis.data.named_templates import TEMPLATES
from pyralis.train.config.field_types import Integer, NoWord, Number, OnOff
from pyralis.train.config.own_field import own_field as _own

TEMPLATE_NAMES = tuple(sorted(TEMPLATES))


def _output_dir(fields: dict[str, Any]) -> str:
    """From the fields before it. One that is refused is missing, and an older pydantic asks for this even so."""
    model = PurePath(fields.get("model_name_or_path", "").rstrip("/\\")).name or "model"
    return f"output/{model}-{fields.get('task_type')}-{fields.get('train_mode')}"


def _known_template(name: str) -> str:
    if name and name not in TEMPLATE_NAMES:
        raise ValueError("unknown template")
    return name


class DataFields(BaseModel):
    """Order matters: defaults look back."""

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

    # Mixtures and streams
    source_weights: list[Number] | None = _own(
        None, "Weights of the entries of train_file: their shares of the tokens. null: everything as it comes.",
        min_length=1,
    )  # fmt: skip
    stopping_strategy: Literal["all_exhausted", "first_exhausted"] = _own(
        "all_exhausted",
        "Where an epoch of weighted sources ends: when each was gone through at least once, or when the first has no "
        "more to give.",
    )
    streaming: bool = _own(
        False, "pretrain: read, tokenise and pack while training, without end (max_steps); nothing is prepared on disk."
    )
    stream_buffer_size: Integer = _own(
        1024, "streaming: rows that are shuffled among themselves. 1: in the order of the files.", ge=1
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
    early_stopping_patience: Integer | None = _own(
        None, "Stop after so many evaluations in a row whose loss is not below the lowest. null: never.", ge=1
    )
    early_stopping_threshold: Number = _own(
        0.0, "By how much an evaluation loss must be below the lowest to count as below it.", ge=0
    )
