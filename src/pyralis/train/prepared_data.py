"""The data of a run, ready to be trained on: tokenizer, template, rows, and whether they fit a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from pyralis.data.dataset import BuiltData, build_dataset, template_for
from pyralis.data.settings import DataSettings
from pyralis.data.store import highest_token, longest_sequence
from pyralis.data.stream import DocumentStream
from pyralis.data.stream_build import build_stream
from pyralis.data.template import ChatTemplate
from pyralis.errors import ConfigError, ModelError
from pyralis.models.rope_scaling import context_length
from pyralis.models.tokenizer import load_tokenizer
from pyralis.train.config.train_config import TrainConfig


@dataclass(frozen=True, slots=True)
class PreparedData:
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    data: BuiltData


def prepare_data(config: TrainConfig, progress: Any = None) -> PreparedData:
    """Tokenizer, template and token ids: all that can fail before a model is loaded.

    Raises:
        ModelError, TemplateError, DataError: each names the file, row or template and what to do.
    """
    tokenizer = load_tokenizer(
        config.model_name_or_path, revision=config.model_revision, trust_remote_code=config.trust_remote_code
    )
    template = template_for(config.task_type, config.template_name, tokenizer, system=config.system)
    settings = DataSettings.from_config(config)
    if settings.streaming:
        data = build_stream(settings, tokenizer, progress=progress)
    else:
        data = build_dataset(settings, tokenizer, template, progress=progress)
    return PreparedData(tokenizer, template, data)


def check_rows(data: BuiltData, arguments: TrainingArguments) -> None:
    """Raise ConfigError if no batch can be filled, which the Trainer would call a finished run."""
    batch = arguments.per_device_train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and isinstance(data.train, Dataset) and len(data.train) < batch:
        raise ConfigError(
            f"dataloader_drop_last: {len(data.train)} rows do not fill one batch of {batch}, so nothing would be "
            "trained. Set it to false, or per_device_train_batch_size lower."
        )


def check_fits(model: Any, prepared: PreparedData) -> tuple[str, ...]:
    """Raise if the model has no embedding for a token or a position of the data; note what is odd about the two.

    Raises:
        ModelError: token ids beyond the vocabulary (a tokenizer of another model).
        ConfigError: rows longer than a learnt table of positions.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    if isinstance(prepared.data.train, DocumentStream):
        prepared.data.train.vocabulary = vocabulary
    built = _built(prepared.data)
    if len(prepared.tokenizer) > vocabulary and (highest := max(map(highest_token, built), default=0)) >= vocabulary:
        raise ModelError(
            f"the data holds token {highest} ({prepared.tokenizer.convert_ids_to_tokens(highest)!r}), but the model "
            f"has only {vocabulary} embeddings: the tokenizer is not this model's."
        )
    longest = longest_of(prepared.data)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not limit or longest <= (context_length(model.config) or limit):
        return ()
    if has_learnt_positions(model):
        raise ConfigError(
            f"max_seq_length: a row has {longest} tokens, but {type(model).__name__} has only {limit} positions. Set "
            f"max_seq_length to {limit} or less."
        )
    return (f"the longest row has {longest} tokens; the model was made for {limit}, and is unsure beyond",)


def _built(data: BuiltData) -> list[Dataset]:
    return [part for part in (data.train, data.eval) if isinstance(part, Dataset)]


def longest_of(data: BuiltData) -> int:
    """Tokens of the longest sequence."""
    stream = data.train.row_length if isinstance(data.train, DocumentStream) else 0
    return max([stream, *map(longest_sequence, _built(data))])


def has_learnt_positions(model: nn.Module) -> bool:
    """Whether positions are looked up in a table (GPT-2, OPT), which ends, and not computed (rotary, ALiBi)."""
    return any(
        isinstance(module, nn.Embedding) and re.search(r"(^|\.)(wpe|\w*position\w*)$", name)
        for name, module in model.named_modules()
    )
