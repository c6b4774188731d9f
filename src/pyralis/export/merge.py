"""Merge an adapter into its base model: a standard folder that stock transformers loads.

The weights are merged and written a layer at a time (`merged_weights.py`, `write_model.py`). An adapter trained on a
4-bit base is merged onto the dequantised 4-bit weights: it has learnt to correct their errors, which the original
weights lack.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyralis.data.template import TEMPLATE_FILE, load_template, save_template, stop_token_ids
from pyralis.errors import ModelError
from pyralis.export.write_model import write_model
from pyralis.lora.adapter import load_adapter
from pyralis.lora.attach import count_parameters
from pyralis.lora.record import TrainingRecord, read_record
from pyralis.models.dtype import DtypeName, choose_device
from pyralis.models.files import read_json
from pyralis.models.generation import settle_generation
from pyralis.models.load import ModelSettings, load_model, load_tokenizer
from pyralis.models.nf4 import is_four_bit
from pyralis.models.source import ModelSource, locate_model
from pyralis.models.staging import check_disk_space, check_not_base, check_target, staged_folder

BasePrecision: TypeAlias = Literal["trained", "original"]
Report: TypeAlias = Callable[[str], None]


def merge_adapter(
    adapter_dir: Path,
    out: Path,
    *,
    base: str | None = None,
    dtype: DtypeName = "auto",
    base_precision: BasePrecision = "trained",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    report: Report = lambda line: None,
) -> Path:
    """Write base + adapter as one model to `out`, with tokenizer, chat template and generation config.

    Args:
        base: the base model, instead of the one the adapter names.
        dtype: of the written weights; `auto` is the base checkpoint's own.
        base_precision: `trained` merges a QLoRA adapter onto the 4-bit weights, dequantised; `original` onto the
            original ones.
        overwrite: replace a model that is at `out`.
        report: is told what happens, a line at a time.

    Returns `out`.

    Raises:
        ModelError: no adapter there, a base model that is missing or does not fit, `out` in use, no disk space.
    """
    adapter_dir, out = Path(adapter_dir), Path(out)
    check_target(out, overwrite=overwrite)
    if not adapter_dir.is_dir():
        raise ModelError(f"There is no folder {adapter_dir}; expected an adapter's folder.")
    source = locate_model(str(adapter_dir), base=base)
    if source.adapter is None:
        raise ModelError(f"{adapter_dir} is a whole model, not an adapter: there is nothing to merge.")
    check_not_base(out, source.path)
    record = read_record(adapter_dir)
    stored = _stored_dtype(source)
    out_dtype = stored if dtype == "auto" else getattr(torch, dtype)
    quantized = record.quantized and base_precision == "trained"
    report(f"base: {source.path}" + (f", in {record.quant_type} as it was trained on" if quantized else ""))

    model = _load_base(source, record, quantized, stored, base_precision, trust_remote_code)
    tuned = load_adapter(model, adapter_dir)
    report(f"merging into {str(out_dtype).removeprefix('torch.')}")

    check_disk_space(out.parent, int(1.02 * count_parameters(model).total * out_dtype.itemsize))
    tokenizer = load_tokenizer(str(adapter_dir), trust_remote_code=trust_remote_code, base=base)
    with staged_folder(out, overwrite=overwrite) as staging:
        _set_generation(model, adapter_dir, tokenizer, staging)
        write_model(tuned, staging, out_dtype, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(staging)
    report(f"wrote {out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e9:.2f} GB")
    return out


def check_base_precision(name: str) -> BasePrecision:
    """`name` if it is a base precision; ModelError otherwise."""
    if name not in get_args(BasePrecision):
        raise ModelError(f"base_precision is {name!r}; expected one of {', '.join(get_args(BasePrecision))}.")
    return cast("BasePrecision", name)


def _stored_dtype(source: ModelSource) -> torch.dtype:
    """The dtype of the base checkpoint as its config says; float32 where it does not."""
    if source.gguf_file or not source.is_local:
        return torch.bfloat16
    config = read_json(Path(source.path) / "config.json")
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def _load_base(
    source: ModelSource,
    record: TrainingRecord,
    quantized: bool,
    stored: torch.dtype,
    base_precision: BasePrecision,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The base model on the CPU, or in 4 bits where it was quantised (a GPU and a CPU may round a tie differently)."""
    settings = ModelSettings(
        source.location,
        train_mode="qlora" if quantized else "lora",
        quant_type=record.quant_type,
        double_quant=record.double_quant,
        trust_remote_code=trust_remote_code,
        max_seq_length=record.rope_scaled_to,
        rope_scaling=record.rope_scaling,
    )
    # What was quantised are the weights in the dtype of that run.
    dtype = record.dtype if quantized and stored == torch.float32 and record.dtype else stored
    device = choose_device() if quantized else torch.device("cpu")
    loaded = load_model(settings, dtype=dtype, device=device)
    if loaded.quantized and not is_four_bit(loaded.model):
        raise ModelError(
            f"{source.path} is quantised in a way that nothing can be merged into: give the original --base."
        )
    if loaded.quantized and base_precision == "original":
        raise ModelError(f"{source.path} holds 4-bit weights only: give the original model with --base.")
    return loaded.model


def _set_generation(model: PreTrainedModel, adapter: Path, tokenizer: PreTrainedTokenizerBase, staging: Path) -> None:
    """The chat template's file, and its stop tokens where `generate` looks for them."""
    stop_ids: list[int] = []
    if (adapter / TEMPLATE_FILE).is_file():
        template = load_template(adapter, tokenizer)
        save_template(template, staging)
        stop_ids = stop_token_ids(template, tokenizer)
    settle_generation(model, stop_ids, tokenizer.pad_token_id)
