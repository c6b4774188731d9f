"""`pyralis replay`: a saved step again, to see where it goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from pyralis.errors import ConfigError, DataError
from pyralis.lora.attach import attach_lora
from pyralis.models.load import ModelSettings, load_model
from pyralis.ops._shortage import ran_short
from pyralis.train.checkpoints.checkpoint import CONFIG_NAME, RUN_NAME
from pyralis.train.config.train_config import TrainConfig, config_from_dict
from pyralis.train.setup import lora_settings
from pyralis.train.watch.nan_record import SavedStep, read_step
from pyralis.train.watch.non_finite import Origin, find_origin

_DTYPES = ("float32", "float16", "bfloat16")
_TRUSTING = ("trust_remote_code", "allow_pickle_weights")
ADVICE = {
    "weight": "If it is a weight of the base model, its file is damaged; if it is one that is trained, an earlier step "
    "spoilt it: lower learning_rate, and go on from a checkpoint before.",
    "loss": "Look at the rows: labels or weights that divide by nothing.",
}


@dataclass(frozen=True, slots=True)
class ReplayedMicroBatch:
    """number: of the micro-batch within its step. dtype: that it was computed in."""

    number: int
    dtype: torch.dtype
    origin: Origin


@dataclass(frozen=True, slots=True)
class Replay:
    """weights: where those came from, in words. found: of every micro-batch, in each dtype in turn."""

    saved: SavedStep
    weights: str
    found: tuple[ReplayedMicroBatch, ...]

    def advice(self) -> str:
        """What it comes to."""
        bad = [one for one in self.found if one.origin.stage != "nowhere"]
        if not bad:
            return (
                f"With {self.weights} nothing goes wrong in this batch: it was the weights of that very step, which "
                "had diverged. Lower learning_rate or max_grad_norm, or warm up longer."
            )
        if all(one.dtype != torch.float32 for one in bad):
            name = _name(bad[0].dtype)
            return f"In float32 all is finite: {name} overflows or loses too much. " + (
                "Use bf16: true instead of fp16, or dtype: float32." if name == "float16" else "Use dtype: float32."
            )
        return ADVICE.get(
            bad[0].origin.stage,
            "It goes wrong in float32 too: values are too large. Lower learning_rate, or look at the rows.",
        )


def replay(folder: str | Path, progress: Callable[[str], None] | None = None, *, trust: bool = False) -> Replay:
    """Run the step saved in `OUTPUT/nan-step-N` on the stock model, in float32 and in the run's own dtype, with
    dropout off, and find where the first value that is not finite arises. Works on a CPU.

    Its weights are those of the step where they were kept (adapters), else those of the last checkpoint or the base.

    Args:
        trust: allow what the run's config allows: code that comes with the model, pickled weights. The folder may be
            someone else's.

    Raises:
        DataError: the folder is no saved step, or one that its model cannot compute. ConfigError: it is one of
            preferences, or needs `trust`. ModelError: as `load_model`.
    """
    folder = Path(folder)
    saved, batches, weights = read_step(folder)
    output_dir = folder.resolve().parent
    values, record = (_read(output_dir / name) for name in (CONFIG_NAME, RUN_NAME))
    if values.get("task_type") == "dpo":
        raise ConfigError(f"{folder}: this step is of task_type: dpo; replay runs steps of sft and pretrain.")
    config = config_from_dict(values).config
    if not trust and (asked := [name for name in _TRUSTING if getattr(config, name)]):
        raise ConfigError(
            f"{output_dir / CONFIG_NAME} sets {' and '.join(asked)}, which can run code that comes with the model. If "
            "you trust who made that run and its model, add --trust."
        )
    trained = _compute_dtype(record, output_dir / RUN_NAME)
    found = []
    source = ""
    for dtype in dict.fromkeys((torch.float32, trained)):
        if progress is not None:
            progress(f"loading the model for {_name(dtype)}")
        model, source = _stock_model(config, record, saved, weights, output_dir, dtype)
        device = next(model.parameters()).device
        for number, batch in enumerate(batches):
            if progress is not None:
                progress(f"{_name(dtype)}: micro-batch {number + 1} of {len(batches)}")
            model.zero_grad()
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            try:
                origin = find_origin(model, on_device, saved.micro_batches[number].num_items, dtype)
            except Exception as error:  # a batch of other tensors than the model takes makes it raise anything
                if ran_short(error):
                    raise
                raise DataError(
                    f"{folder}: the model cannot compute micro-batch {number + 1} ({type(error).__name__}: {error}). "
                    "Is the folder that of another model, or damaged?"
                ) from error
            found.append(ReplayedMicroBatch(number, dtype, origin))
        del model
    return Replay(saved, source, tuple(found))


def _stock_model(
    config: TrainConfig, record: dict[str, Any], saved: SavedStep, weights: dict[str, Tensor], output_dir: Path,
    dtype: torch.dtype,
) -> tuple[nn.Module, str]:  # fmt: skip
    """(the model in eval mode, where its weights are from)."""
    checkpoint = output_dir / saved.checkpoint if saved.checkpoint else None
    there = checkpoint is not None and checkpoint.is_dir()
    whole = config.train_mode == "full"
    loaded = load_model(
        ModelSettings(
            str(checkpoint) if whole and there else config.model_name_or_path,
            train_mode=config.train_mode,
            dtype=_name(dtype),  # type: ignore[arg-type]
            quant_type=config.quant_type,
            double_quant=config.double_quant,
            attn_implementation=config.attn_implementation,
            revision=None if whole and there else config.model_revision,
            trust_remote_code=config.trust_remote_code,
            allow_pickle_weights=config.allow_pickle_weights,
            max_seq_length=record.get("rope_scaled_to"),
        )
    )
    model: nn.Module = loaded.model
    source = f"the weights of {saved.checkpoint}" if there else "the weights before training"
    if not whole:
        adapter = checkpoint if there else Path(config.load_adapter) if config.load_adapter else None
        model = attach_lora(loaded.model, lora_settings(config), adapter=adapter)
        if weights:
            _put(model, weights)
            source = f"the weights of step {saved.step}"
    return model.eval(), source


@torch.no_grad()
def _put(model: PeftModel, weights: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in weights.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise DataError(f"the saved weights do not fit the model: {name} {list(tensor.shape)} has no place in it.")
        parameters[name].copy_(tensor)


def _compute_dtype(record: Mapping[str, Any], path: Path) -> torch.dtype:
    name, length = record.get("compute_dtype", "float32"), record.get("rope_scaled_to")
    if name not in _DTYPES or not isinstance(length, int | None):
        raise DataError(
            f"{path} is damaged: compute_dtype is {name!r} and rope_scaled_to {length!r}; expected one of "
            f"{', '.join(_DTYPES)}, and a number of tokens or null."
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}). Leave the saved step in the folder of its run.") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} is damaged: it holds a {type(values).__name__}, expected a JSON object.")
    return values


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
