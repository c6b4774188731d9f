"""`nan-step-N`: the step that went wrong, kept in the output folder for `pyralis replay`.

    batch.safetensors      each tensor of micro-batch i as `i.NAME`: input_ids, labels, attention_mask ...
    weights.safetensors    an adapter's weights as they were before that step; whole models are too large
    step.json              `SavedStep`

Processes beside the first one keep their own, in `nan-step-N-rank-R`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyralis.errors import DataError
from pyralis.train.checkpoints.checkpoint import STAGING_PREFIX, write_json
from pyralis.train.watch.batch_rows import BatchRow

BATCH_NAME, WEIGHTS_NAME, STEP_NAME = "batch.safetensors", "weights.safetensors", "step.json"
FOLDER_PREFIX = "nan-step-"


@dataclass(frozen=True, slots=True)
class SavedMicroBatch:
    """loss: its part of the step's loss, computed again with the weights as they were; None where it was not."""

    loss: float | None
    num_items: float | None
    rows: tuple[BatchRow, ...]


@dataclass(frozen=True, slots=True)
class SavedStep:
    """What `step.json` tells.

    loss: the sum over micro-batches. parameters: whose gradient is not finite, in the order in which the backward
    reaches them; None where it was not looked. checkpoint: the last whole one's name. versions: of the software.
    """

    step: int
    seed: int
    rank: int
    loss: float
    micro_batches: tuple[SavedMicroBatch, ...]
    parameters: tuple[str, ...] | None
    checkpoint: str | None
    versions: Mapping[str, str]

    def where(self) -> str:
        """The first parameter, in words; empty where none is known."""
        if self.parameters is None:
            return ""
        if not self.parameters:
            return "Computed again, the gradient of that step is finite. "
        more = f" (and {len(self.parameters) - 1} more)" if len(self.parameters) > 1 else ""
        return f"The first parameter whose gradient is not finite is {self.parameters[0]}{more}. "

    def rows(self, most: int = 4) -> str:
        """Its rows in words, those of micro-batches whose loss is not finite first."""
        ordered = sorted(self.micro_batches, key=lambda m: m.loss is None or math.isfinite(m.loss))
        return rows_text([row for micro_batch in ordered for row in micro_batch.rows], most)


def rows_text(rows: Sequence[BatchRow], most: int = 4) -> str:
    text = "; ".join(map(str, rows[:most]))
    return text if len(rows) <= most else f"{text}; and {len(rows) - most} more"


def folder_name(step: int, rank: int = 0) -> str:
    return f"{FOLDER_PREFIX}{step}" + (f"-rank-{rank}" if rank else "")


def write_step(
    output_dir: Path, saved: SavedStep, batches: Sequence[Mapping[str, Tensor]], weights: Mapping[str, Tensor]
) -> Path:
    """Write `nan-step-N` beside and rename it. batches, weights: on the CPU; without weights no file of them."""
    final = output_dir / folder_name(saved.step, saved.rank)
    staging = output_dir / f"{STAGING_PREFIX}{final.name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    tensors = {f"{i}.{name}": tensor for i, batch in enumerate(batches) for name, tensor in batch.items()}
    save_file(tensors, staging / BATCH_NAME)
    if weights:
        save_file(dict(weights), staging / WEIGHTS_NAME)
    write_json(staging / STEP_NAME, _plain(asdict(saved)))
    if final.exists():
        shutil.rmtree(final)
    os.replace(staging, final)
    return final


def read_step(folder: Path) -> tuple[SavedStep, list[dict[str, Tensor]], dict[str, Tensor]]:
    """(what is told, the micro-batches, the weights that were kept). Raises DataError for any other folder."""
    try:
        values = json.loads((folder / STEP_NAME).read_text(encoding="utf-8"))
        micro_batches = tuple(
            SavedMicroBatch(_number(m["loss"]), _number(m["num_items"]), tuple(BatchRow(**row) for row in m["rows"]))
            for m in values["micro_batches"]
        )
        values |= {"micro_batches": micro_batches, "loss": float(values["loss"])}
        if values["parameters"] is not None:
            values["parameters"] = tuple(values["parameters"])
        saved = SavedStep(**{field.name: values[field.name] for field in fields(SavedStep)})
        _check_types(saved)
        batches: list[dict[str, Tensor]] = [{} for _ in micro_batches]
        for key, tensor in load_file(folder / BATCH_NAME).items():
            number, _, name = key.partition(".")
            batches[int(number)][name] = tensor
        weights = load_file(folder / WEIGHTS_NAME) if (folder / WEIGHTS_NAME).is_file() else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise DataError(
            f"{folder} is no saved step ({type(error).__name__}: {error}). Give a folder such as "
            f"OUTPUT/{FOLDER_PREFIX}120, which a run writes when a loss or a gradient is not finite."
        ) from error
    return saved, batches, weights


def _check_types(saved: SavedStep) -> None:
    """Raise ValueError for what no run writes; `checkpoint` must not lead out of the run."""
    numbers = (saved.step, saved.seed, saved.rank)
    rows = [row for micro_batch in saved.micro_batches for row in micro_batch.rows]
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"step, seed and rank are {numbers!r}, not whole numbers")
    if not all(isinstance(row.text, str) and isinstance(row.row, int | None) for row in rows):
        raise ValueError("a row is something else than a text and its number")
    if saved.checkpoint is not None and not re.fullmatch(r"checkpoint-\d+", saved.checkpoint):
        raise ValueError(f"checkpoint is {saved.checkpoint!r}, not such as checkpoint-100")


def _plain(value: Any) -> Any:
    """For JSON, which has neither NaN nor infinity: these as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
