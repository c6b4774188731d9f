"""The table of old and foreign names. docs/config.md prints it; translate.py applies it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Convert = Callable[[Any, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class OldName:
    """A key that is no field today.

    `convert(value, all values given)` returns what it means under today's names ({}: it has no effect), and raises
    ValueError, saying what to do, where its meaning cannot be kept.
    """

    origin: str
    new: tuple[str, ...]
    why: str
    convert: Convert
    unused: str = "this value asks for nothing"  # said where convert returns {}
    yields: tuple[Any, ...] = ()  # values of the new key that do not contradict the old one


@dataclass(frozen=True)
class OldValue:
    new: str
    why: str


def _renamed(origin: str, new: str, *, values: Mapping[Any, Any] | None = None, why: str = "") -> OldName:
    def convert(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        known = values is not None and isinstance(value, str | bool | int | None) and value in values
        return {new: values[value] if values is not None and known else value}

    return OldName(origin, (new,), why or f"{origin}'s name", convert)


def _dropped(origin: str, why: str) -> OldName:
    return OldName(origin, (), why, lambda value, given: {}, unused=why)


def _refused(origin: str, instead: str, *, harmless: tuple[Any, ...] = (None, "", False, 0)) -> OldName:
    def convert(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        if value in harmless or value in ([], {}):
            return {}
        raise ValueError(f"is not supported. {instead}")

    return OldName(origin, (), f"refused unless it asks for nothing. {instead}".rstrip("."), convert)


def _warmup_ratio(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    try:
        ratio = float(value)
    except (TypeError, ValueError):
        ratio = -1.0
    if isinstance(value, bool) or not 0 <= ratio < 1:
        raise ValueError(f"{value!r} is not allowed; expected a share of all steps, at least 0 and below 1.")
    return {"warmup_steps": ratio} if given.get("warmup_steps") in _NO_WARMUP else {}


def _load_in_4bit(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if value:
        return {"train_mode": "qlora"}
    return {} if given.get("train_mode") in {"full", "lora"} else {"train_mode": "lora"}


def _quantization_bit(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if value not in (None, 4):
        raise ValueError(f"{value!r} is not supported; 4-bit is: train_mode: qlora.")
    return {"train_mode": "qlora"} if value == 4 else {}


def _finetuning_type(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """With LLaMA-Factory's own rank, alpha and dropout where its file leaves them out: alpha / rank is 2 there."""
    if value not in {"full", "lora"}:
        raise ValueError(f"{value!r} is not supported; set train_mode to full, lora or qlora.")
    if value == "full":
        return {"train_mode": "full"}
    rank = given.get("lora_rank", 8)
    defaults = {"lora_rank": rank, "lora_alpha": 2 * rank if isinstance(rank, int) else None, "lora_dropout": 0.0}
    lora = {name: default for name, default in defaults.items() if name not in given and default is not None}
    return {"train_mode": "qlora" if given.get("quantization_bit") == 4 else "lora"} | lora


def _quantization_method(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if value not in (None, "bnb", "bitsandbytes"):
        raise ValueError(f"{value!r} is not supported; 4 bits are bitsandbytes' here.")
    return {}


def _lora_target(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    return {"lora_target_modules": "all-linear" if names in (["all"], ["all-linear"]) else names}


def _val_size(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(value, int | float) and value >= 1:
        raise ValueError(f"{value!r} rows cannot be held out; give eval_split, a share below 1, or an eval_file.")
    return {"eval_split": value}


def _when_true(meaning: dict[str, Any], otherwise: dict[str, Any] | None = None) -> Convert:
    return lambda value, given: dict(meaning) if value in (True, "true") else dict(otherwise or {})


_NO_WARMUP = (None, 0, "0")
_HF = "transformers 4"
_FACTORY = "LLaMA-Factory"
_OTHERS = "other programs"
_NO_AUTO_TOKENIZER = "The tokenizer is the model's; give model_name_or_path."
_FLAG = {True: "group_by_length", False: "random"}
_ATTENTION = {"auto": None, "fa2": "flash_attention_2", "fa3": "flash_attention_3", "disabled": "eager"}
_CHECKPOINTING = {"unsloth": "auto"}

OLD_NAMES: dict[str, OldName] = {
    "evaluation_strategy": _renamed(_HF, "eval_strategy", why="renamed by transformers"),
    "warmup_ratio": OldName(
        _HF,
        ("warmup_steps",),
        "transformers 5 takes a share of all steps as warmup_steps below 1",
        _warmup_ratio,
        unused="warmup_steps is given too and counts first",
        yields=_NO_WARMUP,
    ),
    "per_gpu_train_batch_size": _renamed(_HF, "per_device_train_batch_size", why="renamed by transformers"),
    "per_gpu_eval_batch_size": _renamed(_HF, "per_device_eval_batch_size", why="renamed by transformers"),
    "no_cuda": _renamed(_HF, "use_cpu", why="renamed by transformers"),
    "group_by_length": _renamed(_HF, "train_sampling_strategy", values=_FLAG, why="replaced by transformers"),
    "adafactor": OldName(_HF, ("optim",), "replaced by transformers", _when_true({"optim": "adafactor"})),
    "evaluate_during_training": OldName(
        _HF,
        ("eval_strategy",),
        "replaced by transformers",
        _when_true({"eval_strategy": "steps"}, {"eval_strategy": "no"}),
    ),
    "include_inputs_for_metrics": OldName(
        _HF, ("include_for_metrics",), "replaced by transformers", _when_true({"include_for_metrics": ["inputs"]})
    ),
    "push_to_hub_token": _renamed(_HF, "hub_token", why="renamed by transformers"),
    "push_to_hub_model_id": _renamed(_HF, "hub_model_id", why="renamed by transformers"),
    "push_to_hub_organization": _refused(_HF, "Give hub_model_id: ORGANISATION/NAME."),
    "activation_checkpointing": _renamed("transformers 5", "gradient_checkpointing", why="a newer name of it"),
    "activation_checkpointing_kwargs": _renamed(
        "transformers 5", "gradient_checkpointing_kwargs", why="a newer name of it"
    ),
    "xpu_backend": _renamed(_HF, "ddp_backend", why="renamed by transformers"),
    "torchdynamo": _renamed(_HF, "torch_compile_backend", why="renamed by transformers"),
    "sharded_ddp": _refused(_HF, "Use deepspeed or fsdp."),
    "fsdp_min_num_params": _refused(_HF, "Use fsdp_config: {min_num_params: ...}."),
    "fsdp_transformer_layer_cls_to_wrap": _refused(_HF, "Use fsdp_config: {transformer_layer_cls_to_wrap: ...}."),
    "dispatch_batches": _refused(_HF, "Use accelerator_config: {dispatch_batches: ...}."),
    "split_batches": _refused(_HF, "Use accelerator_config: {split_batches: true}."),
    "logging_dir": _dropped(
        _HF, "TensorBoard writes to <output_dir>/runs, or where the environment variable TENSORBOARD_LOGGING_DIR says"
    ),
    "save_safetensors": _dropped(_HF, "weights are always saved as safetensors"),
    "fp16_opt_level": _dropped(_HF, "it was for NVIDIA apex"),
    "fp16_backend": _dropped(_HF, "mixed precision is PyTorch's own"),
    "half_precision_backend": _dropped(_HF, "mixed precision is PyTorch's own"),
    "use_mps_device": _dropped(_HF, "an Apple GPU is used when there is one"),
    "use_ipex": _dropped(_HF, "it is part of PyTorch"),
    "jit_mode_eval": _dropped(_HF, "evaluation is not traced"),
    "include_tokens_per_second": _dropped(_HF, "tokens per second are always measured"),
    "past_index": _dropped(_HF, "it was for models with memory between batches"),
    "ray_scope": _dropped(_HF, "it was for hyperparameter search"),
    "mp_parameters": _dropped(_HF, "it was for SageMaker"),
    "tpu_num_cores": _dropped(_HF, "the launcher decides on it"),
    "tpu_metrics_debug": _dropped(_HF, "debug: tpu_metrics_debug says it"),
    "tokenizer": _refused("TRL", _NO_AUTO_TOKENIZER),
    "processing_class": _refused("TRL", _NO_AUTO_TOKENIZER),
    "max_length": _renamed("TRL", "max_seq_length"),
    "dataset_num_proc": _renamed("TRL", "tokenize_num_workers"),
    "dataset_text_field": _refused(
        "TRL",
        "The format of the rows is recognised; plain text lies under the key text.",
        harmless=(None, "", "text", "messages"),
    ),
    "assistant_only_loss": OldName(
        "TRL", ("loss_on",), "TRL's name", _when_true({"loss_on": "all_turns"}, {"loss_on": "everything"})
    ),
    "padding_free": _dropped("TRL", "packing says it"),
    "use_liger": _renamed("TRL", "use_liger_kernel"),
    "model_init_kwargs": _refused("TRL", "Give dtype, attn_implementation and model_revision."),
    "lora_r": _renamed("PEFT", "lora_rank"),
    "r": _renamed("PEFT", "lora_rank"),
    "target_modules": OldName("PEFT", ("lora_target_modules",), "PEFT's name", _lora_target),
    "bias": _renamed("PEFT", "lora_bias"),
    "loftq_config": _refused("PEFT", "LoftQ changes the base weights, so the adapter would not fit the base."),
    "torch_dtype": _renamed(_HF, "dtype", values={None: "auto"}, why="renamed by transformers"),
    "load_in_4bit": OldName("Unsloth", ("train_mode",), "Unsloth's name", _load_in_4bit),
    "load_in_8bit": _refused("Unsloth", "4-bit is: train_mode: qlora."),
    "full_finetuning": OldName("Unsloth", ("train_mode",), "Unsloth's name", _when_true({"train_mode": "full"})),
    "model_name": _renamed("Unsloth", "model_name_or_path"),
    "random_state": _renamed("Unsloth", "seed"),
    "use_gradient_checkpointing": _renamed("Unsloth", "gradient_checkpointing", values=_CHECKPOINTING),
    "stage": _renamed(_FACTORY, "task_type", values={"pt": "pretrain"}),
    "finetuning_type": OldName(
        _FACTORY,
        ("train_mode", "lora_rank", "lora_alpha", "lora_dropout"),
        "LLaMA-Factory's name; for lora its rank 8, alpha 2 x rank and dropout 0 are meant where they are not given",
        _finetuning_type,
    ),
    "quantization_bit": OldName(_FACTORY, ("train_mode",), "LLaMA-Factory's name", _quantization_bit),
    "quantization_method": OldName(_FACTORY, (), "4 bits are always bitsandbytes'", _quantization_method),
    "double_quantization": _renamed(_FACTORY, "double_quant"),
    "enable_liger_kernel": _renamed(_FACTORY, "use_liger_kernel"),
    "template": _renamed(_FACTORY, "template_name"),
    "dataset": _renamed(_FACTORY, "train_file"),
    "eval_dataset": _renamed(_FACTORY, "eval_file"),
    "dataset_dir": _refused(_FACTORY, "Give the path of the data itself as train_file."),
    "cutoff_len": _renamed(_FACTORY, "max_seq_length"),
    "lora_target": OldName(_FACTORY, ("lora_target_modules",), "LLaMA-Factory's name", _lora_target),
    "pref_beta": _renamed(_FACTORY, "beta"),
    "pref_loss": _renamed(_FACTORY, "loss_type"),
    "pref_ftx": _renamed(_FACTORY, "rpo_alpha"),
    "flash_attn": _renamed(_FACTORY, "attn_implementation", values=_ATTENTION),
    "early_stopping_steps": _renamed(_FACTORY, "early_stopping_patience"),
    "eval_fraction": _renamed(_OTHERS, "eval_split", why="a name of it elsewhere"),
    "val_size": OldName(_FACTORY, ("eval_split",), "LLaMA-Factory's name", _val_size),
    "preprocessing_num_workers": _renamed(_FACTORY, "tokenize_num_workers"),
    "adapter_name_or_path": _renamed(_FACTORY, "load_adapter"),
    "neat_packing": _renamed(_FACTORY, "packing"),
    "pure_bf16": _renamed(_FACTORY, "bf16"),
    "train_on_prompt": OldName(_FACTORY, ("loss_on",), "LLaMA-Factory's name", _when_true({"loss_on": "everything"})),
    "mask_history": OldName(_FACTORY, ("loss_on",), "LLaMA-Factory's name", _when_true({"loss_on": "last_turn"})),
    "overwrite_cache": _dropped(_FACTORY, "the cache of prepared data goes by content and cannot be stale"),
    "plot_loss": _dropped(_FACTORY, "the loss is always plotted"),
}

OLD_VALUES: dict[tuple[str, str], OldValue] = {
    ("optim", "adamw_hf"): OldValue("adamw_torch", "was removed from transformers"),
    ("optim", "adamw_apex_fused"): OldValue("adamw_torch_fused", "was removed from transformers"),
}
