"""From a checked config to what a run is made of: tokenizer, data, model, Trainer arguments."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from pyralis.compat import checkpointing_argument
from pyralis.data.pack import require_isolation
from pyralis.data.template import stop_token_ids
from pyralis.errors import ConfigError
from pyralis.lora.attach import LoraSettings, ParameterCount, attach_lora, count_parameters
from pyralis.lora.record import has_record, read_record
from pyralis.memory.auto import follow_plan
from pyralis.models.causal_lm import causal_lm_of
from pyralis.models.dtype import choose_device, choose_dtype
from pyralis.models.float16_range import float16_warning
from pyralis.models.generation import settle_generation
from pyralis.models.load import LoadedModel, ModelSettings, load_model
from pyralis.models.surgery import AccelerationReport, accelerate, report
from pyralis.train.config.refusals import refusals_named
from pyralis.train.config.train_config import TrainConfig
from pyralis.train.device_fit import CPU_OPTIMIZERS
from pyralis.train.full_weights import bf16_update, bytes_per_parameter
from pyralis.train.prepared_data import PreparedData, check_fits, longest_of, prepare_data

__all__ = ["PreparedData", "PreparedModel", "prepare_data", "prepare_model", "training_arguments"]

logger = logging.getLogger(__name__)

# Optimizers of a GPU, and what does the same arithmetic on a CPU.
_CPU_OPTIMIZERS = {"adamw_torch_fused": "adamw_torch", **CPU_OPTIMIZERS}


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """The model as it is trained, adapters attached, and what is odd about it and its data."""

    model: Any
    loaded: LoadedModel
    acceleration: AccelerationReport
    parameters: ParameterCount
    notes: tuple[str, ...] = ()


def prepare_model(config: TrainConfig, prepared: PreparedData) -> PreparedModel:
    """Load the model, see that the data fits it, put the fast path in, attach the adapter."""
    if config.attn_implementation == "flex_attention" and choose_device().type == "cpu":
        raise ConfigError("attn_implementation: flex_attention cannot learn on a CPU; set it to sdpa or eager.")
    half_weights = _half_weights(config)
    loaded = load_model(
        ModelSettings(
            config.model_name_or_path,
            train_mode=config.train_mode,
            master_weights="float32" if half_weights is None else "compute",
            dtype=config.requested_dtype,  # type: ignore[arg-type]
            quant_type=config.quant_type,
            double_quant=config.double_quant,
            attn_implementation=config.attn_implementation,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
            allow_pickle_weights=config.allow_pickle_weights,
            max_seq_length=_length_for_rope(config, prepared),
        )
    )
    if half_weights is not None:
        loaded = replace(loaded, notes=(*loaded.notes, half_weights))
    notes = check_fits(loaded.model, prepared)
    if config.task_type == "sft" and config.packing:
        require_isolation(loaded.model)
    acceleration = accelerate(loaded.model, config.acceleration)
    model: Any = loaded.model
    if config.train_mode != "full":
        adapter = Path(config.load_adapter) if config.load_adapter else None
        model = attach_lora(loaded.model, lora_settings(config), adapter=adapter)
    else:
        stops = [] if prepared.template is None else stop_token_ids(prepared.template, prepared.tokenizer)
        settle_generation(loaded.model, stops, prepared.tokenizer.pad_token_id)
    if config.gradient_checkpointing == "auto" and acceleration.fast_layers:
        follow_plan(causal_lm_of(model))
    if acceleration.fast_layers:
        acceleration = report(model)  # asked again: the adapter may be of a kind that runs stock
    if config.acceleration == "on" and acceleration.fast_layers < len(acceleration.layers):
        logger.warning("acceleration: on, but %s", "; ".join(acceleration.lines))
    if (warning := float16_warning(loaded.model, acceleration.fast_layers)) is not None:
        logger.warning(warning)
    return PreparedModel(model, loaded, acceleration, count_parameters(model), notes)


def _half_weights(config: TrainConfig) -> str | None:
    """What there is to say of bfloat16 weights that are trained whole; None where weights are float32 or frozen."""
    dtype = choose_dtype(config.requested_dtype, choose_device()).dtype  # type: ignore[arg-type]
    if config.train_mode != "full" or dtype != torch.bfloat16 or (update := bf16_update(config)) == "master":
        return None
    how = {"split": "their lower 16 bits beside the optimizer's states", "stochastic": "rounded stochastically"}
    return f"bfloat16 weights, {how[update]}: {bytes_per_parameter(config)} bytes a parameter, activations apart"


def _length_for_rope(config: TrainConfig, prepared: PreparedData) -> int | None:
    """The longest sequence that RoPE has to reach; None leaves it as it is. An adapter keeps that of its training."""
    adapter = Path(config.load_adapter) if config.load_adapter else None
    if adapter is not None and has_record(adapter):
        return read_record(adapter).rope_scaled_to
    if config.rope_scaling == "off":
        return None
    return longest_of(prepared.data)


def base_name(config: TrainConfig) -> str | None:
    """What a saved adapter calls its base model, where that is not the folder it was found in: the name as given, with
    which the adapter loads on other machines too."""
    named = config.train_mode != "full" and not Path(config.model_name_or_path).expanduser().exists()
    return config.model_name_or_path if named else None


def lora_settings(config: TrainConfig) -> LoraSettings:
    targets = config.lora_target_modules
    return LoraSettings(
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=targets if targets == "all-linear" else tuple(targets),  # type: ignore[arg-type]
        bias=config.lora_bias,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights,  # type: ignore[arg-type]
        modules_to_save=tuple(config.modules_to_save or ()),
    )


def training_arguments(config: TrainConfig) -> tuple[TrainingArguments, list[str]]:
    """The Trainer's arguments for this device, and notes on what became of words the device cannot follow.

    Made before the model is loaded: what is wrong with them is said early, and DeepSpeed's ZeRO-3 shards a model while
    it loads only if they exist.

    Raises:
        ConfigError: what transformers refuses.
    """
    notes = []
    device = choose_device()
    dtype = choose_dtype(config.requested_dtype, device).dtype  # type: ignore[arg-type]
    arguments = config.training_arguments()
    arguments["output_dir"] = str(config.output_dir)
    arguments["bf16"] = dtype == torch.bfloat16
    arguments["fp16"] = dtype == torch.float16
    if device.type == "cpu":
        arguments["use_cpu"] = True
        arguments["dataloader_pin_memory"] = False
        arguments["tf32"] = None
        optim = str(config.optim)
        if optim in _CPU_OPTIMIZERS:
            arguments["optim"] = _CPU_OPTIMIZERS[optim]
            if "optim" in config.model_fields_set:
                notes.append(f"optim: {optim} needs a GPU; {_CPU_OPTIMIZERS[optim]} does the same here")
    if config.streaming:
        arguments["ignore_data_skip"] = True  # the stream itself begins where the checkpoint says
    if config.optimizer_in_bwd:
        arguments["max_grad_norm"] = 0.0
    if checkpoints_layers(config, device):
        arguments[checkpointing_argument("gradient_checkpointing")] = True
        arguments.setdefault(checkpointing_argument("gradient_checkpointing_kwargs"), {"use_reentrant": False})
    if not (config.eval_file or config.eval_split):
        arguments["eval_strategy"] = "no"
    arguments["prediction_loss_only"] = True
    arguments["label_names"] = ["labels"]
    with refusals_named():
        return TrainingArguments(**arguments), notes


def checkpoints_layers(config: TrainConfig, device: torch.device) -> bool:
    """Whether layers that no memory plan is made for are recomputed in the backward pass.

    `full`: all layers. `auto`: on a GPU, whose memory is scarce, those that run stock; not on a CPU, where it would
    cost a third of the step for memory that is there.
    """
    return config.gradient_checkpointing == "full" or (
        config.gradient_checkpointing == "auto" and device.type == "cuda"
    )
