"""How an adapter was trained, kept beside it: the precision and the RoPE scaling that its base model had."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pyralis.errors import ModelError
from pyralis.models.files import read_json
from pyralis.models.rope_scaling import RopeScaling
from pyralis.models.staging import write_text

# What is written beside an adapter alone (`write_record`).
ADAPTER_RECORD = "pyralis_adapter.json"
# And what a run writes into its output folder: first what it resolved, then what its config said.
RECORDS = (ADAPTER_RECORD, "pyralis_run.json", "pyralis_config.json")
_CHECKPOINT = re.compile(r"checkpoint-\d+$")


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """What the base model was like while the adapter was trained.

    Attributes:
        quantized: its linear layers were in 4 bits (`train_mode: qlora`), of `quant_type` and `double_quant`.
        dtype: the half-precision dtype that its weights were cast to, if one is recorded; else None.
        rope_scaled_to: the sequence length that RoPE was scaled for, if it was.
        rope_scaling: the scaling, where it was given and not chosen.
        model_type: its architecture, as transformers names it ("llama"); None where that is not recorded.
    """

    quantized: bool = False
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    dtype: torch.dtype | None = None
    rope_scaled_to: int | None = None
    rope_scaling: RopeScaling | None = None
    model_type: str | None = None


def write_record(adapter: Path, record: TrainingRecord) -> None:
    """Write the record of an adapter that no run of ours has made into its folder."""
    content = {
        "train_mode": "qlora" if record.quantized else "lora",
        "quant_type": record.quant_type,
        "double_quant": record.double_quant,
        "compute_dtype": None if record.dtype is None else str(record.dtype).removeprefix("torch."),
        "rope_scaled_to": record.rope_scaled_to,
        "rope_scaling_given": record.rope_scaling,
        "model_type": record.model_type,
    }
    write_text(adapter / ADAPTER_RECORD, json.dumps(content, indent=2) + "\n")


def has_record(adapter: Path) -> bool:
    """Whether anything is recorded, so that what the record does not say was not so."""
    return any((_folder(adapter) / name).is_file() for name in RECORDS)


def read_record(adapter: Path) -> TrainingRecord:
    """The record of the run that made an adapter, for `checkpoint-N` that of the folder around it; an adapter of
    another program counts as trained unquantised. Raises ModelError for one that is damaged."""
    folder = _folder(adapter)
    values: dict[str, Any] = {}
    for name in reversed(RECORDS):
        if (folder / name).is_file():
            values |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    length, scaling = values.get("rope_scaled_to"), values.get("rope_scaling_given")
    if not isinstance(length, int | None) or not isinstance(scaling, int | float | dict | None):
        raise ModelError(
            f"{folder}: its record ({', '.join(RECORDS)}) is damaged: rope_scaled_to is {length!r} and "
            f"rope_scaling_given {scaling!r}; expected a number of tokens, and a factor or its fields."
        )
    dtype = values.get("compute_dtype")
    if dtype is None:
        dtype = "float16" if values.get("fp16") else "bfloat16" if values.get("bf16") else values.get("dtype")
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    return TrainingRecord(
        quantized=values.get("train_mode") == "qlora",
        quant_type="fp4" if values.get("quant_type") == "fp4" else "nf4",
        double_quant=bool(values.get("double_quant", True)),
        dtype=half.get(str(dtype).removeprefix("torch.")),
        rope_scaled_to=length,
        rope_scaling=scaling,
        model_type=values.get("model_type"),
    )


def _folder(adapter: Path) -> Path:
    adapter = adapter.resolve()
    return adapter.parent if _CHECKPOINT.match(adapter.name) else adapter
