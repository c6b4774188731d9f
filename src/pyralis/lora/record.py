"""How an adapter was trained, read from what its run left beside it: which precision its base model had."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pyralis.models.files import read_json

# What a run writes into its output folder: first what it resolved, then what its config said.
RECORDS = ("pyralis_run.json", "pyralis_config.json")
_CHECKPOINT = re.compile(r"checkpoint-\d+$")


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """The base model's precision while the adapter was trained.

    Attributes:
        quantized: its linear layers were in 4 bits (`train_mode: qlora`), of `quant_type` and `double_quant`.
        dtype: the half-precision dtype that its weights were cast to, if one is recorded; else None.
    """

    quantized: bool = False
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    dtype: torch.dtype | None = None


def read_record(adapter: Path) -> TrainingRecord:
    """The record of the run that made an adapter, for `checkpoint-N` that of the folder around it; an adapter of
    another program counts as trained unquantised."""
    adapter = adapter.resolve()
    folder = adapter.parent if _CHECKPOINT.match(adapter.name) else adapter
    values: dict[str, Any] = {}
    for name in reversed(RECORDS):
        if (folder / name).is_file():
            values |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    dtype = values.get("compute_dtype")
    if dtype is None:
        dtype = "float16" if values.get("fp16") else "bfloat16" if values.get("bf16") else values.get("dtype")
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    return TrainingRecord(
        quantized=values.get("train_mode") == "qlora",
        quant_type="fp4" if values.get("quant_type") == "fp4" else "nf4",
        double_quant=bool(values.get("double_quant", True)),
        dtype=half.get(str(dtype).removeprefix("torch.")),
    )
