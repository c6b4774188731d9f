"""What a config would take on a GPU: the memory plan of its largest batch, before anything is loaded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pyralis.data.files import resolve_files
from pyralis.data.store import longest_sequence
from pyralis.errors import ConfigError, ModelError, PyralisError
from pyralis.lora.attach import attach_lora
from pyralis.memory.auto import margin
from pyralis.memory.calibrate import device_rates
from pyralis.memory.cost import Batch
from pyralis.memory.footprint import CONTEXT
from pyralis.memory.gpus import GpuRates, find_gpu
from pyralis.memory.plan import Plan, largest, plan
from pyralis.memory.predict import Settings
from pyralis.memory.shape import Assumed, ModelShape, describe_model
from pyralis.models.dtype import choose_device
from pyralis.models.fetch import hub_is_reachable
from pyralis.models.published import published_config
from pyralis.models.source import locate_model
from pyralis.models.surgery import decoder_layers
from pyralis.ops._triton import Gpu
from pyralis.train.config.train_config import TrainConfig
from pyralis.train.full_weights import bf16_update
from pyralis.train.setup import lora_settings, prepare_data

BYTES_PER_TOKEN = 4.0  # of text files, where the tokenizer is not there
REFERENCE = 0.3  # of a step's time: DPO's forward of the reference
MOST_TOKENS = 1 << 23
# Bytes beside an optimizer's states per parameter, of all weights trained in bfloat16 (docs/full-fine-tuning.md).
SPLIT_BYTES = 2.0


@dataclass(frozen=True, slots=True)
class DataSize:
    """Tokens of an epoch; exact, or guessed from the size of the files. longest: tokens of the longest row."""

    tokens: int
    exact: bool
    longest: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """largest_batch: rows of the planned length; longest: tokens of one row. Both with the most frugal plan.

    seconds: of a micro-batch. hours: of all epochs; None where the data is not known.
    """

    config: TrainConfig
    rates: GpuRates
    plan: Plan
    rows: int
    length: int
    largest_batch: int
    longest: int
    seconds: float
    data: DataSize | None
    notes: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float:
        return self.plan.batch.tokens / self.seconds

    @property
    def hours(self) -> float | None:
        if self.data is None:
            return None
        return self.data.tokens * float(self.config.num_train_epochs) / self.tokens_per_second / 3600


def plan_run(
    config: TrainConfig, gpu: str | None = None, *, batch: int | None = None, length: int | None = None
) -> PlannedRun:
    """Plan for the largest batch that a config may make, or for `batch` rows of `length` tokens.

    gpu: of the table (`memory/gpus.py`), or a size such as "24GB"; None: the one that is here.

    Raises:
        ConfigError: no GPU here and none named, or one that is not in the table.
        ModelError: a model whose shape is not known here, or whose layers run stock.
    """
    rates, usable = _gpu(gpu)
    data = _data_size(config)
    pair = 2 if config.task_type == "dpo" else 1
    rows, longest = largest_batch(config, None if data is None else data.longest)
    length = longest if length is None else length
    rows = rows if batch is None else batch * pair
    model, moments = _shape(config, rates)
    settings = Settings(moments, config.gradient_accumulation_steps, recorded=config.cuda_graph == "auto")
    made = plan(model, Batch(rows, length), usable, rates, settings)
    seconds = made.seconds.total * (1 + (REFERENCE if config.task_type == "dpo" else 0))
    bounds = (model, usable, rates, settings)
    return PlannedRun(
        config, rates, made, rows, length,
        largest(lambda n: Batch(pair * n, length), *bounds, most=max(MOST_TOKENS // length, 1)),
        64 * largest(lambda n: Batch(pair, 64 * n), *bounds, most=MOST_TOKENS // 64),
        seconds, data, tuple(_notes(config, rates, model)),
    )  # fmt: skip


def _gpu(name: str | None) -> tuple[GpuRates, int]:
    """(its rates, bytes that the allocator may have)."""
    if name is not None:
        rates = find_gpu(name)
        return rates, rates.memory_bytes - CONTEXT - margin(rates.memory_bytes)
    device = choose_device()
    if device.type != "cuda":
        raise ConfigError(
            "There is no GPU here: say which one is meant, as in --gpu rtx4090, --gpu a100 or --gpu 24GB."
        )
    rates = device_rates(device)
    return rates, torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - margin(rates.memory_bytes)


def _shape(config: TrainConfig, rates: GpuRates) -> tuple[ModelShape, float]:
    """The model as it would be trained, and bytes of optimizer states for each trained parameter."""
    half = torch.bfloat16 if rates.capability >= (8, 0) else torch.float16
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    dtype = names.get(config.requested_dtype, half)
    dtype = half if dtype == torch.bfloat16 else dtype
    moments, weights, autocast = moment_bytes(config, dtype), dtype, None
    if config.train_mode == "full" and (dtype != torch.bfloat16 or bf16_update(config) == "master"):
        weights, autocast = torch.float32, dtype if dtype != torch.float32 else None
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        causal: Any = AutoModelForCausalLM.from_config(
            model_config(config.model_name_or_path, config.model_revision), dtype=weights
        )
        if config.train_mode != "full":
            tuned: Any = _with_adapter(config, causal)
    layers = decoder_layers(causal)
    gpu = Gpu(rates.capability, 100)
    if config.train_mode == "full":
        return describe_model(causal, layers, gpu, autocast=autocast), moments
    four_bit = config.train_mode == "qlora"
    assumed = Assumed(four_bit, config.double_quant, dtype)
    return describe_model(tuned.get_base_model(), layers, gpu, assumed=assumed), moments


def moment_bytes(config: TrainConfig, dtype: torch.dtype) -> float:
    """Of optimizer states, for each trained parameter. dtype: of the weights, where all are trained."""
    split = config.train_mode == "full" and dtype == torch.bfloat16 and bf16_update(config) == "split"
    return (2.1 if "8bit" in str(config.optim) else 8.0) + (SPLIT_BYTES if split else 0.0)


def largest_batch(config: TrainConfig, longest: int | None) -> tuple[int, int]:
    """(rows, tokens of each) of the largest micro-batch. longest: tokens of the longest row; None: not known."""
    known = longest is not None and not config.packing
    length = min(config.max_seq_length, longest) if known and longest is not None else config.max_seq_length
    return config.per_device_train_batch_size * (2 if config.task_type == "dpo" else 1), length


def _with_adapter(config: TrainConfig, causal: Any) -> Any:
    if config.load_adapter:
        return get_peft_model(causal, LoraConfig.from_pretrained(config.load_adapter, inference_mode=False))
    return attach_lora(causal, lora_settings(config))


def model_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """From the model's folder, the hub's cache, the hub, or the table of well-known models.

    Raises ModelError where none of them has it.
    """
    folder = Path(name).expanduser()
    path = locate_model(name, revision=revision).path if folder.exists() else name
    reachable = folder.exists() or hub_is_reachable()
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, revision=revision, local_files_only=not reachable)
    except (OSError, ValueError, KeyError) as error:
        fields = published_config(name)
        if fields is None:
            raise ModelError(
                f"{name}: its shape is not known. It is no folder here, the hub was not reached, and it is not in the "
                "table of well-known models. Give the model's folder; its config.json is enough."
            ) from error
        config = AutoConfig.for_model(**fields)
    if getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def _data_size(config: TrainConfig) -> DataSize | None:
    """Tokenised if the tokenizer is here (what was tokenised before is found again), else guessed."""
    try:
        rows: Any = prepare_data(config).data.train  # a stream has no length
        return DataSize(int(sum(rows.data["length"].to_pylist())), True, longest_sequence(rows))
    except (PyralisError, OSError, AttributeError):
        pass
    try:
        files = resolve_files(config.train_file)
    except PyralisError:
        return None
    sizes = [file.stat().st_size for file in files if isinstance(file, Path)]
    return DataSize(int(sum(sizes) / BYTES_PER_TOKEN), False) if len(sizes) == len(files) and sizes else None


def _notes(config: TrainConfig, rates: GpuRates, model: ModelShape) -> list[str]:
    notes = []
    if not rates.measured:
        notes.append(
            f"{rates.name}: data-sheet figures times what an H100 reached of its own; `pyralis plan` on the GPU itself "
            "measures it"
        )
    if config.gradient_checkpointing != "auto":
        word = str(config.gradient_checkpointing).lower()
        notes.append(f"gradient_checkpointing is {word} in the config: this is what auto would do")
    if shard := "deepspeed" if config.deepspeed else "fsdp" if config.fsdp else None:
        notes.append(f"{shard}: the plan is for one GPU that holds the whole model")
    if not any(layer.runs_in_tiles for layer in model.layers):
        notes.append(
            "lora_dropout keeps MLPs from running in tiles of tokens: without it the longest context is longer"
        )
    if config.task_type == "dpo":
        notes.append("pairs are counted as two whole rows, and the reference's forward as 30 % of a step")
    return notes
