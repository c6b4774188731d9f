"""Arguments of TRL's trainers as older scripts pass them, and what TRL takes in their place today.

Before TRL 1 a trainer took `tokenizer=`, `max_seq_length=`, `packing=` and the like itself, and plain
`TrainingArguments`. Today all of these are fields of a config, some under another name, and some are gone.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import TrainingArguments

from pyralis.errors import ConfigError
from pyralis.train.config.suggest import did_you_mean
from pyralis.train.device_fit import fit_to_device

logger = logging.getLogger(__name__)

# an old argument of a trainer -> the trainer's argument today
TRAINER_NAMES = {"tokenizer": "processing_class", "dataset": "train_dataset"}
# an old argument of a trainer or a config -> the config's field today
FIELD_NAMES = {"max_seq_length": "max_length", "max_target_length": "max_completion_length"}
# an argument that has no effect any more -> what happens instead
GONE = {
    "max_prompt_length": "prompts are not cut by themselves; a row whose prompt alone fills max_length is dropped",
    "max_completion_length": "prompt and completion share max_length",
    "num_of_sequences": "packing counts tokens",
    "chars_per_token": "packing counts tokens",
    "infinite": "max_steps says when a stream ends",
    "dataset_batch_size": "rows are tokenised one by one",
    "label_pad_token_id": "labels are padded with -100",
    "padding_value": "rows are padded with the tokenizer's pad token",
    "is_encoder_decoder": "the model says so itself",
    "model_adapter_name": "the active adapter is trained",
    "ref_adapter_name": "the adapter named 'ref' is the reference",
    "force_use_ref_model": "a ref_model that is given is used",
    "reference_free": "beta and loss_type decide",
    "generate_during_eval": "nothing is generated while training",
    "use_num_logits_to_keep": "logits of a prompt are never made",
    "ref_model_init_kwargs": "pass a loaded ref_model",
}


@dataclass(frozen=True, slots=True)
class TrainerCall:
    """What one of TRL's trainers is called with: its config, its other arguments, and what became of the old ones."""

    args: Any
    arguments: dict[str, Any]
    notes: tuple[str, ...]


def todays_call(
    trainer: type, config: type[TrainingArguments], args: TrainingArguments | None, given: Mapping[str, Any]
) -> TrainerCall:
    """Translate a call of a trainer, and fit it to the device.

    Args:
        trainer: TRL's class, whose signature says what it takes.
        config: the class that `args` has to be of.
        args: as given: of that class, plain `TrainingArguments`, another config, or None. Never changed.
        given: all other arguments, old names and today's.

    Raises:
        ConfigError: an argument that no version of the trainer had, or one given under both its names.
    """
    taken = set(inspect.signature(trainer.__init__).parameters) - {"self", "args"}  # type: ignore[misc]
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    arguments: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    notes: list[str] = []
    for name, value in given.items():
        today = TRAINER_NAMES.get(name, name)
        field = FIELD_NAMES[name] if FIELD_NAMES.get(name) in fields else name
        if today in taken:
            if arguments.get(today) is not None and value is not None:
                raise ConfigError(
                    f"{trainer.__name__} was given both {name} and {today}, which are the same: keep one."
                )
            if value is not None or today not in arguments:
                arguments[today] = value
            if today != name and value is not None:
                notes.append(f"{name}= is called {today}= today")
        elif field in fields:
            if value is not None:
                settings[field] = value
                notes.append(f"{name}= is {config.__name__}({field}=...) today")
        elif name in GONE:
            if value is not None:
                notes.append(f"{name}= has no effect: {GONE[name]}")
        else:
            raise ConfigError(
                f"{trainer.__name__} takes no argument {name!r}.{did_you_mean(name, {*taken, *fields, *TRAINER_NAMES})}"
            )
    made, more = _config(config, args)
    for field, value in settings.items():
        setattr(made, field, value)
    if type(args) is TrainingArguments and "max_length" in fields and "max_length" not in settings:
        more += (f"max_length is {made.max_length}, TRL's default, since TrainingArguments has none",)
    return TrainerCall(made, arguments, (*more, *notes, *fit_to_device(made)))


def _config(config: type[TrainingArguments], args: TrainingArguments | None) -> tuple[Any, tuple[str, ...]]:
    """Of class `config`: a copy, or the fields that `args` shares with it."""
    if args is None:
        return config(), ()
    if isinstance(args, config):
        return copy.copy(args), ()
    if not isinstance(args, TrainingArguments):
        raise ConfigError(f"args is a {type(args).__name__}; expected {config.__name__} or TrainingArguments.")
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    hidden = {name for name in fields if name.endswith("_token") and hasattr(args, name)}  # to_dict writes <HUB_TOKEN>
    values = args.to_dict() | {name: getattr(args, name) for name in hidden}
    lost = sorted(name for name in _changed(args) if name not in fields and name in values)
    notes = tuple(f"{type(args).__name__}({name}=...) has no effect in {config.__name__}" for name in lost)
    return config(**{name: value for name, value in values.items() if name in fields}), notes


def _changed(args: TrainingArguments) -> list[str]:
    """Names of fields that differ from their defaults."""
    return [
        field.name
        for field in dataclasses.fields(args)
        if field.default is not dataclasses.MISSING and getattr(args, field.name) != field.default
    ]


@cache
def say_once(message: str) -> None:
    """A warning, the first time in this process."""
    logger.warning("%s", message)
