"""A model from its folder or name: safetensors only, in the right dtype, on this process's device, NF4 for QLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from pyralis.errors import ConfigError, ModelError
from pyralis.models.architecture import resolve_architecture
from pyralis.models.dtype import DtypeChoice, DtypeName, choose_device, choose_dtype
from pyralis.models.files import check_weights
from pyralis.models.gguf import gguf_options
from pyralis.models.hub import HubOptions
from pyralis.models.nf4 import is_four_bit, settle_four_bit
from pyralis.models.rope_scaling import RopeScaling, scale_rope
from pyralis.models.source import ADAPTER_WITHIN, ModelSource, locate_model
from pyralis.models.tokenizer import load_tokenizer

__all__ = ["LoadedModel", "ModelSettings", "TrainMode", "load_model", "load_tokenizer"]

TrainMode: TypeAlias = Literal["full", "lora", "qlora"]


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """How to load a model.

    Attributes:
        model_name_or_path: a folder, a .gguf file, an adapter's folder, a demo model's name or a hub name.
        train_mode: `qlora` quantises the linear layers while loading.
        dtype: to compute in; see `choose_dtype` for `auto`.
        master_weights: in `full` mode only: keep the weights in float32, to which small updates can be added
            (bfloat16 loses updates below 0.4 % of a weight), or in the compute dtype, at half the memory.
        bits: of `qlora`: 4, or bitsandbytes' 8-bit layers.
        quant_type, double_quant: of bitsandbytes' 4-bit layers.
        attn_implementation: None lets transformers choose.
        allow_pickle_weights: read .bin files too. They can run code.
        base: for an adapter, the base model to take instead of the one it names.
        max_seq_length: RoPE is scaled for sequences of that many tokens where the model is for shorter ones
            (`rope_scaling.py`); None leaves it as it is.
        rope_scaling: exactly this scaling instead.
        device_map: as transformers takes it, for a model over several devices; None is one device.
    """

    model_name_or_path: str
    train_mode: TrainMode = "lora"
    dtype: DtypeName = "auto"
    master_weights: Literal["float32", "compute"] = "float32"
    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle_weights: bool = False
    base: str | None = None
    max_seq_length: int | None = None
    rope_scaling: RopeScaling | None = None
    device_map: str | Mapping[str, Any] | None = None
    hub: HubOptions = field(default_factory=HubOptions)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, and what a panel says about it.

    Attributes:
        dtype: to compute in; the weights are in it too, except for float32 master weights.
        quantized: whether linear layers are packed.
        adapter: the adapter's folder if one was named. `model` is then its base: the adapter is still to be attached.
        rope_scaled_to: `max_seq_length`, where RoPE was scaled for it or as given.
        notes: choices the user should see.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    quantized: bool
    device: torch.device
    adapter: Path | None = None
    rope_scaled_to: int | None = None
    notes: tuple[str, ...] = ()


def load_model(
    settings: ModelSettings, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> LoadedModel:
    """Load a causal language model for training or inference, in eval mode.

    Args:
        device, dtype: exactly these, instead of what `choose_device` and `choose_dtype` would say.

    Raises:
        ModelError: anything about the folder, its files, its architecture or the combination of settings.
        FetchError: a demo model that cannot be fetched.
    """
    source = locate_model(settings.model_name_or_path, revision=settings.revision, base=settings.base)
    _check_source(source, settings)
    device = device or choose_device()
    choice = DtypeChoice(dtype) if dtype is not None else choose_dtype(settings.dtype, device)
    notes = [choice.note] if choice.note else []
    config = _load_config(source, settings)
    stored = _check_quantization(config, source, settings)
    if (rope := scale_rope(config, settings.max_seq_length, settings.rope_scaling)) is not None:
        notes.append(rope.note)

    options: dict[str, Any] = {
        "config": config,
        "dtype": choice.dtype,
        "device_map": {"": str(device)} if settings.device_map is None else settings.device_map,
        "revision": settings.revision,
        "trust_remote_code": settings.trust_remote_code,
        "use_safetensors": None if settings.allow_pickle_weights else True,
        **settings.hub.arguments(source.path),
    }
    if source.gguf_file:
        options |= {"gguf_file": source.gguf_file, **gguf_options()}
        notes.append("a GGUF file: its weights are dequantised, not the original ones")
    elif settings.train_mode == "qlora" and stored is None:
        options["quantization_config"] = quantization(settings, choice.dtype)
    if settings.train_mode == "full" and settings.master_weights == "float32" and choice.dtype != torch.float32:
        options["dtype"] = torch.float32
        notes.append(f"float32 master weights, {str(choice.dtype).removeprefix('torch.')} compute")
    if settings.train_mode == "full" and options["dtype"] == torch.float16:
        raise ModelError("Training every weight in float16 needs float32 master weights: master_weights `float32`.")
    if attention := settings.attn_implementation or _needed_attention(config):
        options["attn_implementation"] = attention
        if not settings.attn_implementation:
            notes.append(f"{attention} attention: this model caps attention scores, which SDPA would ignore")

    model = _from_pretrained(source, options)
    if stored == "bitsandbytes":
        _cast_plain_weights(model, choice.dtype)
    if stored is not None:
        notes.append(f"the checkpoint is quantised already ({stored}): loaded as it is")
    quantized = stored is not None or ("quantization_config" in options and not source.gguf_file)
    if is_four_bit(model):
        settle_four_bit(model, choice.dtype)
    scaled_to = settings.max_seq_length if rope is not None and rope.scaled else None
    return LoadedModel(model.eval(), choice.dtype, quantized, device, source.adapter, scaled_to, tuple(notes))


def quantization(settings: ModelSettings, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """How a plain checkpoint is quantised while it is loaded."""
    if settings.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quant_type,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _check_source(source: ModelSource, settings: ModelSettings) -> None:
    if source.adapter is not None and settings.train_mode == "full":
        raise ModelError(
            f"{source.adapter} is an adapter, which full training would leave out: merge it first "
            "(`pyralis export merge`) and train the merged model."
        )
    if source.gguf_file:
        if settings.train_mode == "qlora":
            raise ModelError(
                f"{source.gguf_file} is quantised already: quantising it again for qlora would lose more. Take the "
                "original safetensors, or train_mode `lora`."
            )
        return
    if source.is_local:
        check_weights(Path(source.path), allow_pickle_weights=settings.allow_pickle_weights)
    try:
        resolve_architecture(source.path, settings.trust_remote_code)
    except ConfigError as error:
        raise ModelError(str(error)) from error


def _load_config(source: ModelSource, settings: ModelSettings) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(
            source.path,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            **settings.hub.arguments(source.path),
            **({"gguf_file": source.gguf_file} if source.gguf_file else {}),
        )
    except OSError as error:
        if source.is_local:
            raise ModelError(f"The config of {source.path} cannot be read: {error}") from error
        raise ModelError(
            f"{source.path} is neither a folder here nor can it be had from the hub ({_first_line(error)}). "
            "Check the name and the connection, or download it elsewhere and give its folder."
        ) from error
    except Exception as error:  # a config with odd values makes transformers raise anything
        raise ModelError(f"The config of {source.path} cannot be used: {_first_line(error)}") from error


def _check_quantization(config: PreTrainedConfig, source: ModelSource, settings: ModelSettings) -> str | None:
    """How the stored weights are quantised ("bitsandbytes"), or None."""
    stored = getattr(config, "quantization_config", None)
    if not stored or source.gguf_file:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    name = str(getattr(method, "value", method) or "bitsandbytes")
    if settings.train_mode == "full":
        raise ModelError(
            f"{source.path} is quantised ({name}): only adapters can be trained on it, so use lora or qlora."
        )
    if settings.train_mode == "qlora" and name != "bitsandbytes":
        raise ModelError(
            f"{source.path} is quantised as {name} already: use train_mode `lora`, or the original weights."
        )
    return name


def _needed_attention(config: PreTrainedConfig) -> str | None:
    """`eager` where attention scores are soft-capped (Gemma 2): older transformers default to SDPA, without the cap."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None


def _from_pretrained(source: ModelSource, options: dict[str, Any]) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source.path, output_loading_info=True, **options)
        model, report = loaded
    except Exception as error:  # a config that fits no model, or a damaged GGUF file, makes libraries raise anything
        if isinstance(error, torch.OutOfMemoryError):
            raise ModelError(f"{source.path} does not fit into the GPU's memory: {_first_line(error)}") from error
        raise ModelError(f"{source.path} cannot be loaded: {_first_line(error)}") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(ADAPTER_WITHIN.format(source.path))
    if missing := sorted(report.get("missing_keys") or ()):
        raise ModelError(
            f"{source.path} lacks {len(missing)} of the model's weights ({', '.join(missing[:4])}): the checkpoint is "
            "not whole, or its config.json belongs to another model."
        )
    return model


def _cast_plain_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """transformers leaves embeddings and norms of a quantised checkpoint in the dtype that they are stored in."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
