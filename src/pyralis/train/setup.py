"""From a checked config to what a run is made of: tokenizer, data, model, Trainer arguments."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from pyralis.data.dataset import BuiltData, build_dataset, template_for
from pyralis.data.pack import require_isolation
from pyralis.data.settings import DataSettings
from pyralis.data.template import ChatTemplate
from pyralis.errors import ConfigError
from pyralis.lora.attach import LoraSettings, ParameterCount, attach_lora, count_parameters
from pyralis.models.load import LoadedModel, ModelSettings, load_model
from pyralis.models.surgery import AccelerationReport, accelerate
from pyralis.models.tokenizer import load_tokenizer
from pyralis.train.config import TrainConfig

logger = logging.getLogger(__name__)

# bitsandbytes' and torch's fused optimizers that a CPU does not have, and what does the same arithmetic there.
_CPU_OPTIMIZERS = {
    "adamw_torch_fused": "adamw_torch",
    "adamw_8bit": "adamw_torch",
    "adamw_bnb_8bit": "adamw_torch",
    "paged_adamw": "adamw_torch",
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw_8bit": "adamw_torch",
}


@dataclass(frozen=True, slots=True)
class PreparedData:
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    data: BuiltData


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """The model as it is trained, adapters attached."""

    model: Any
    loaded: LoadedModel
    acceleration: AccelerationReport
    parameters: ParameterCount


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


def prepare_model(config: TrainConfig) -> PreparedModel:
    """Load the model, put the fast path in, attach the adapter."""
    loaded = load_model(
        ModelSettings(
            config.model_name_or_path,
            train_mode=config.train_mode,
            dtype=config.requested_dtype,  # type: ignore[arg-type]
            quant_type=config.quant_type,
            double_quant=config.double_quant,
            attn_implementation=config.attn_implementation,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
            allow_pickle_weights=config.allow_pickle_weights,
        )
    )
    if loaded.quantized and config.train_mode == "full":
        raise ConfigError(
            f"train_mode: full, but the weights of {config.model_name_or_path} are quantised and cannot be trained. "
            "Use train_mode: qlora, or the checkpoint that is not quantised."
        )
    if config.task_type == "sft" and config.packing:
        require_isolation(loaded.model)
    acceleration = accelerate(loaded.model, config.acceleration)
    if config.acceleration == "on" and acceleration.fast_layers < len(acceleration.layers):
        logger.warning("acceleration: on, but %s", "; ".join(acceleration.lines))
    model: Any = loaded.model
    if config.train_mode != "full":
        adapter = Path(config.load_adapter) if config.load_adapter else loaded.adapter
        model = attach_lora(loaded.model, lora_settings(config), adapter=adapter)
        if adapter is None and not Path(config.model_name_or_path).exists():
            # The name as given, not the cache folder it was found in: the adapter should load on other machines.
            model.peft_config[model.active_adapter].base_model_name_or_path = config.model_name_or_path
    model.config.use_cache = False
    return PreparedModel(model, loaded, acceleration, count_parameters(model))


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


def training_arguments(
    config: TrainConfig, *, dtype: torch.dtype, device: torch.device, has_eval: bool
) -> tuple[TrainingArguments, list[str]]:
    """The Trainer's arguments for this device, and notes on what became of words the device cannot follow."""
    notes = []
    arguments = config.training_arguments()
    arguments["output_dir"] = str(config.output_dir)
    arguments["bf16"] = dtype == torch.bfloat16
    arguments["fp16"] = dtype == torch.float16
    if device.type == "cpu":
        arguments["use_cpu"] = True
        arguments["dataloader_pin_memory"] = False
        arguments["tf32"] = None
        optim = str(getattr(config.optim, "value", config.optim))
        if optim in _CPU_OPTIMIZERS:
            arguments["optim"] = _CPU_OPTIMIZERS[optim]
            if "optim" in config.model_fields_set:
                notes.append(f"optim: {optim} needs a GPU; {_CPU_OPTIMIZERS[optim]} does the same here")
    if checkpoints_layers(config, device):
        arguments["gradient_checkpointing"] = True
        arguments.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
    if not has_eval:
        arguments["eval_strategy"] = "no"
    arguments["prediction_loss_only"] = True
    arguments["label_names"] = ["labels"]
    return TrainingArguments(**arguments), notes


def checkpoints_layers(config: TrainConfig, device: torch.device) -> bool:
    """Whether each layer is recomputed in the backward pass.

    `full` always does. `auto` does on a GPU, whose memory is scarce, and not on a CPU, where it would cost a third of
    the step for memory that is there.
    """
    return config.gradient_checkpointing == "full" or (
        config.gradient_checkpointing == "auto" and device.type == "cuda"
    )
