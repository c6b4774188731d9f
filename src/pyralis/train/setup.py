"""From a checked config to what a run is made of: tokenizer, data, model, Trainer arguments."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from pyralis.compat import checkpointing_argument
from pyralis.data.dataset import BuiltData, build_dataset, template_for
from pyralis.data.pack import require_isolation
from pyralis.data.settings import DataSettings
from pyralis.data.store import highest_token, longest_sequence
from pyralis.data.template import ChatTemplate, stop_token_ids
from pyralis.errors import ConfigError, ModelError
from pyralis.lora.attach import LoraSettings, ParameterCount, attach_lora, count_parameters
from pyralis.lora.record import has_record, read_record
from pyralis.memory.auto import follow_plan
from pyralis.models.causal_lm import causal_lm_of
from pyralis.models.dtype import choose_device, choose_dtype
from pyralis.models.float16_range import float16_warning
from pyralis.models.generation import settle_generation
from pyralis.models.load import LoadedModel, ModelSettings, load_model
from pyralis.models.rope_scaling import context_length
from pyralis.models.surgery import AccelerationReport, accelerate, report
from pyralis.models.tokenizer import load_tokenizer
from pyralis.train.config import TrainConfig
from pyralis.train.device_fit import CPU_OPTIMIZERS
from pyralis.train.full_weights import bf16_update
from pyralis.train.refusals import refusals_named

logger = logging.getLogger(__name__)

# Optimizers of a GPU, and what does the same arithmetic on a CPU.
_CPU_OPTIMIZERS = {"adamw_torch_fused": "adamw_torch", **CPU_OPTIMIZERS}


@dataclass(frozen=True, slots=True)
class PreparedData:
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    data: BuiltData


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """The model as it is trained, adapters attached, and what is odd about it and its data."""

    model: Any
    loaded: LoadedModel
    acceleration: AccelerationReport
    parameters: ParameterCount
    notes: tuple[str, ...] = ()


def prepare_data(config: TrainConfig, progress: Any = None) -> PreparedData:
    """Tokenizer, template and token ids: all that can fail before a model is loaded.

    Raises:
        ModelError, TemplateError, DataError: each names the file, row or template and what to do.
    """
    tokenizer = load_tokenizer(
        config.model_name_or_path, revision=config.model_revision, trust_remote_code=config.trust_remote_code
    )
    template = template_for(config.task_type, config.template_name, tokenizer, system=config.system)
    data = build_dataset(DataSettings.from_config(config), tokenizer, template, progress=progress)
    return PreparedData(tokenizer, template, data)


def check_rows(data: BuiltData, arguments: TrainingArguments) -> None:
    """Raise ConfigError if no batch can be filled, which the Trainer would call a finished run."""
    batch = arguments.per_device_train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and len(data.train) < batch:
        raise ConfigError(
            f"dataloader_drop_last: {len(data.train)} rows do not fill one batch of {batch}, so nothing would be "
            "trained. Set it to false, or per_device_train_batch_size lower."
        )


def prepare_model(config: TrainConfig, prepared: PreparedData) -> PreparedModel:
    """Load the model, see that the data fits it, put the fast path in, attach the adapter."""
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
    notes = check_fits(loaded.model, prepared) + (() if half_weights is None else (half_weights,))
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
    return f"bfloat16 weights, {how[update]}"


def check_fits(model: Any, prepared: PreparedData) -> tuple[str, ...]:
    """Raise if the model has no embedding for a token or a position of the data; note what is odd about the two.

    Raises:
        ModelError: token ids beyond the vocabulary (a tokenizer of another model).
        ConfigError: rows longer than a learnt table of positions.
    """
    parts = [part for part in (prepared.data.train, prepared.data.eval) if part is not None]
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(prepared.tokenizer) > vocabulary and (highest := max(map(highest_token, parts))) >= vocabulary:
        raise ModelError(
            f"the data holds token {highest} ({prepared.tokenizer.convert_ids_to_tokens(highest)!r}), but the model "
            f"has only {vocabulary} embeddings: the tokenizer is not this model's."
        )
    longest = max(map(longest_sequence, parts))
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not limit or longest <= (context_length(model.config) or limit):
        return ()
    if has_learnt_positions(model):
        raise ConfigError(
            f"max_seq_length: a row has {longest} tokens, but {type(model).__name__} has only {limit} positions. Set "
            f"max_seq_length to {limit} or less."
        )
    return (f"the longest row has {longest} tokens; the model was made for {limit}, and is unsure beyond",)


def _length_for_rope(config: TrainConfig, prepared: PreparedData) -> int | None:
    """The longest sequence that RoPE has to reach; None leaves it as it is. An adapter keeps that of its training."""
    adapter = Path(config.load_adapter) if config.load_adapter else None
    if adapter is not None and has_record(adapter):
        return read_record(adapter).rope_scaled_to
    if config.rope_scaling == "off":
        return None
    parts = [part for part in (prepared.data.train, prepared.data.eval) if part is not None]
    return max(map(longest_sequence, parts))


def has_learnt_positions(model: nn.Module) -> bool:
    """Whether positions are looked up in a table (GPT-2, OPT), which ends, and not computed (rotary, ALiBi)."""
    return any(
        isinstance(module, nn.Embedding) and re.search(r"(^|\.)(wpe|\w*position\w*)$", name)
        for name, module in model.named_modules()
    )


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
