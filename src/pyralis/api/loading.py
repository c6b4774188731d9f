"""`FastLanguageModel.from_pretrained`: a model and its tokenizer from wherever they are, accelerated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import PreTrainedTokenizerBase

from pyralis.api.modes import check_choice, offload_embedding, set_checkpointing
from pyralis.api.notice import notice
from pyralis.api.origin import Checkpointing, Origin, set_origin
from pyralis.api.saving import bind_methods
from pyralis.errors import ModelError
from pyralis.lora.attach import LoraSettings, attach_lora
from pyralis.lora.record import TrainingRecord, has_record, read_record
from pyralis.models.download import hub_is_cut_off
from pyralis.models.dtype import DtypeName, check_dtype_name, choose_device, choose_dtype
from pyralis.models.hub import HubOptions
from pyralis.models.load import LoadedModel, ModelSettings, TrainMode, load_model, load_tokenizer
from pyralis.models.rope_scaling import RopeScaling, context_length
from pyralis.models.source import ModelSource, locate_model, looks_like_path
from pyralis.models.surgery import accelerate

# device maps that mean this process's one GPU, or the CPU
_ONE_DEVICE = (None, "sequential", "auto", "balanced", "balanced_low_0", "cuda")


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """`from_pretrained`'s arguments that say something here; their meaning is in its docstring."""

    name: str
    max_seq_length: int | None
    dtype: torch.dtype | str | None
    load_in_4bit: bool
    load_in_8bit: bool
    load_in_16bit: bool
    full_finetuning: bool
    device_map: Any
    rope_scaling: RopeScaling | None
    checkpointing: Checkpointing
    resize_model_vocab: int | None
    revision: str | None
    random_state: int
    attn_implementation: str | None
    hub: HubOptions
    offload_embedding: bool = False

    @property
    def mode(self) -> TrainMode:
        if self.full_finetuning:
            return "full"
        if self.load_in_8bit or (self.load_in_4bit and not self.load_in_16bit):
            return "qlora"
        return "lora"


def load_for_training(request: LoadRequest) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model, with its adapter if an adapter was named, and its tokenizer.

    Raises:
        ModelError, FetchError: see `load_model`, `load_tokenizer` and `load_adapter`.
    """
    _check(request)
    name = _local_adapter(request.name, request.revision, request.hub)
    source = locate_model(name, revision=request.revision)
    tokenizer = load_tokenizer(name, revision=request.revision, hub=request.hub)
    earlier = TrainingRecord() if source.adapter is None else read_record(source.adapter)
    request = _as_trained(request, source, earlier)
    loaded = _load(request, name, source, earlier)
    for note in loaded.notes:
        notice(note)
    if request.resize_model_vocab is not None:
        _resize(loaded.model, request.resize_model_vocab, request.random_state)
    limit = context_length(loaded.model.config)
    length = request.max_seq_length or limit
    if length is not None and tokenizer.model_max_length < length:
        tokenizer.model_max_length = length

    report = accelerate(loaded.model)
    set_origin(loaded.model, _origin(request, name, source, earlier, loaded, length, tokenizer))
    bind_methods(loaded.model)
    model: Any = loaded.model
    if source.adapter is not None:
        model = attach_lora(loaded.model, LoraSettings(), adapter=source.adapter)
        bind_methods(model)
        offload_embedding(model)
    set_checkpointing(model, request.checkpointing)
    notice(f"{request.name}: {'; '.join(report.lines)}")
    return model, tokenizer


def _check(request: LoadRequest) -> None:
    check_choice(request.checkpointing)
    if not isinstance(request.name, str | Path):
        raise ModelError(f"model_name is {request.name!r}; expected a folder, a hub name or a demo model's name.")
    if request.max_seq_length is not None and request.max_seq_length < 1:
        raise ModelError(
            f"max_seq_length is {request.max_seq_length}; expected at least 1, or None for the model's own."
        )


def _as_trained(request: LoadRequest, source: ModelSource, earlier: TrainingRecord) -> LoadRequest:
    """With the RoPE that the base model had when its adapter was trained: the adapter is right for no other."""
    if source.adapter is None or not has_record(source.adapter) or request.rope_scaling is not None:
        return request
    if request.max_seq_length not in (None, earlier.rope_scaled_to):
        trained = (
            f"scaled for {earlier.rope_scaled_to} tokens" if earlier.rope_scaled_to else "as the base model has it"
        )
        notice(f"RoPE is {trained}, as when the adapter was trained, whatever max_seq_length says")
    return replace(request, max_seq_length=earlier.rope_scaled_to, rope_scaling=earlier.rope_scaling)


def _load(request: LoadRequest, name: str, source: ModelSource, earlier: TrainingRecord) -> LoadedModel:
    mode = request.mode
    if source.gguf_file and mode == "qlora":
        notice("load_in_4bit and load_in_8bit have no effect on a GGUF file: it is quantised already, and dequantised")
        mode = "lora"
    device, device_map = _placement(request.device_map)
    dtype = _dtype_name(request.dtype)
    # weights in 16 bits, or float32 ones to which small updates can be added
    compute = request.load_in_16bit or dtype in ("bfloat16", "float16")
    settings = ModelSettings(
        name,
        train_mode=mode,
        dtype=dtype,
        master_weights="compute" if compute else "float32",
        bits=8 if request.load_in_8bit else 4,
        quant_type=earlier.quant_type,
        double_quant=earlier.double_quant,
        attn_implementation=request.attn_implementation,
        revision=request.revision,
        max_seq_length=request.max_seq_length,
        rope_scaling=request.rope_scaling,
        device_map=device_map,
        hub=request.hub,
    )
    return load_model(settings, device=device)


def _origin(
    request: LoadRequest,
    name: str,
    source: ModelSource,
    earlier: TrainingRecord,
    loaded: LoadedModel,
    length: int | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Origin:
    named = source.adapter is None and not Path(name).expanduser().exists()
    origin = Origin(
        request.mode, max_seq_length=length, name=name if named else source.location, tokenizer=tokenizer,
        offload_embedding=request.offload_embedding,
    )  # fmt: skip
    record = TrainingRecord(
        quantized=loaded.quantized and request.mode == "qlora" and not request.load_in_8bit,
        quant_type=earlier.quant_type,
        double_quant=earlier.double_quant,
        dtype=None if loaded.dtype == torch.float32 else loaded.dtype,
        rope_scaled_to=loaded.rope_scaled_to,
        rope_scaling=request.rope_scaling,
        model_type=loaded.model.config.model_type,
    )
    return replace(origin, record=record)


def _dtype_name(dtype: torch.dtype | str | None) -> DtypeName:
    return "auto" if dtype is None else check_dtype_name(str(dtype).removeprefix("torch."))


def _placement(device_map: Any) -> tuple[torch.device | None, str | Mapping[str, Any] | None]:
    """(the one device, None), or (None, a map over several). None, None is this process's own device."""
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return torch.device("cuda", device_map), None
    if isinstance(device_map, torch.device):
        return device_map, None
    if device_map in (None, "sequential", "cuda") or (device_map in _ONE_DEVICE and torch.cuda.device_count() < 2):
        return None, None
    if isinstance(device_map, str) and device_map not in _ONE_DEVICE:
        try:
            return torch.device(device_map), None
        except RuntimeError as error:
            raise ModelError(
                f'device_map is {device_map!r}; expected "sequential" (this process\'s GPU), "auto" or "balanced" '
                "(several GPUs), a device or a dictionary."
            ) from error
    return None, device_map


def _resize(model: Any, size: int, seed: int) -> None:
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)  # new rows are drawn around the mean of the others
        model.resize_token_embeddings(size)
    notice(f"the embedding has {model.get_input_embeddings().num_embeddings} rows now, as resize_model_vocab says")


def _local_adapter(name: str, revision: str | None, hub: HubOptions) -> str:
    """The folder of an adapter that the hub has under `name`; any other name as it is."""
    if Path(name).expanduser().exists() or looks_like_path(name) or "/" not in name:
        return name
    if isinstance(try_to_load_from_cache(name, "config.json", cache_dir=hub.cache_dir, revision=revision), str):
        return name
    options: dict[str, Any] = {"cache_dir": hub.cache_dir, "revision": revision, "token": hub.token}
    cached = try_to_load_from_cache(name, "adapter_config.json", cache_dir=hub.cache_dir, revision=revision)
    if not isinstance(cached, str):
        if hub.local_files_only or hub_is_cut_off():
            return name
        try:
            if not file_exists(name, "adapter_config.json", revision=revision, token=hub.token):
                return name
            if file_exists(name, "config.json", revision=revision, token=hub.token):
                return name  # a whole model with an adapter beside it
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
            return name  # whatever is wrong, loading the model says it
    return snapshot_download(name, local_files_only=isinstance(cached, str), **options)


def is_bfloat16_supported() -> bool:
    """Whether this process has a GPU with bfloat16, as scripts ask for `TrainingArguments(bf16=...)`, which refuses it
    without a GPU even where a CPU is fast in it."""
    device = choose_device()
    return device.type == "cuda" and choose_dtype("auto", device).dtype == torch.bfloat16
