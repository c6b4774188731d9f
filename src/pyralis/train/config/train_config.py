"""The checked config: what a file says, under today's names, with every default filled in.

Nothing here builds `TrainingArguments`, imports deepspeed, or touches a model's weights, data, GPU or network.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pyralis.compat import CHECKPOINTING_NAMES, checkpointing_argument, training_argument_fields
from pyralis.errors import ConfigError
from pyralis.models.architecture import Architecture, resolve_architecture
from pyralis.train.config.check import check
from pyralis.train.config.field_types import describe_type
from pyralis.train.config.fields import TEMPLATE_NAMES, OwnFields
from pyralis.train.config.findings import Finding
from pyralis.train.config.old_names import OLD_NAMES
from pyralis.train.config.read_config import parse_overrides, read_config_file
from pyralis.train.config.suggest import did_you_mean
from pyralis.train.config.training_arguments import dataclass_arguments, training_arguments_model
from pyralis.train.config.translate import translate

# activation_checkpointing is transformers' newer word for gradient_checkpointing: old_names.py leads it there.
_TrainingArgumentsFields: Any = training_arguments_model({*OwnFields.model_fields, *CHECKPOINTING_NAMES.values()})


class TrainConfig(OwnFields, _TrainingArgumentsFields):
    """Every field of a run as an attribute: Pyralis's, Firefly's and all of `TrainingArguments`. Frozen.

    Made by `load_config` or `config_from_dict`, which also translate old names and check how fields fit together.
    """

    @cached_property
    def architecture(self) -> Architecture:
        """What the model is, as far as a local config.json or its well-known name tells."""
        return resolve_architecture(self.model_name_or_path, self.trust_remote_code)

    @property
    def requested_dtype(self) -> str:
        """`float16` or `bfloat16` by the flags fp16 and bf16, which count first; else the field `dtype`."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else self.dtype

    def training_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `transformers.TrainingArguments`: what was given and what Pyralis defaults to.

        Layers are checkpointed by the Trainer only for `gradient_checkpointing: full`; `auto` is Pyralis's own
        policy. The device's word on fp16 and bf16 is the caller's to add, as is resuming.
        """
        known = set(training_argument_fields()) - {"resume_from_checkpoint"}
        names = known & (self.model_fields_set | set(OwnFields.model_fields))
        arguments = {name: copy.deepcopy(getattr(self, name)) for name in sorted(names)}
        for name, kind in dataclass_arguments().items():
            if isinstance(arguments.get(name), Mapping):
                arguments[name] = kind(**arguments[name])
        if self.save_strategy == "best" or self.early_stopping_patience is not None:
            arguments.setdefault("metric_for_best_model", "loss")
        arguments["gradient_checkpointing"] = self.gradient_checkpointing == "full"
        for name in CHECKPOINTING_NAMES:
            if name in arguments:
                arguments[checkpointing_argument(name)] = arguments.pop(name)
        return arguments

    def effective(self) -> dict[str, Any]:
        """What is printed and saved: enough to run the same again. JSON types only; tokens are left out."""
        fields = type(self).model_fields
        own = [n for n in OwnFields.model_fields if getattr(self, n) is not None or fields[n].default is not None]
        given = [n for n in fields if n in self.model_fields_set and n not in OwnFields.model_fields]
        return {n: copy.deepcopy(getattr(self, n)) for n in (*own, *given) if not n.endswith("_token")}


@dataclass(frozen=True)
class LoadedConfig:
    """A checked config, and what its writer should know about how it was read."""

    config: TrainConfig
    notes: tuple[str, ...]
    path: Path | None = None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a JSON or YAML config, apply `key=value` overrides, translate old names, check everything.

    Raises ConfigError that names every problem at once.
    """
    path = Path(path)
    return _load(read_config_file(path), parse_overrides(overrides), path)


def config_from_dict(values: Mapping[str, Any]) -> LoadedConfig:
    """The same for a dictionary."""
    return _load(values, {}, None)


def known_names() -> list[str]:
    """Every key a config may hold: today's fields, then old names."""
    return [*TrainConfig.model_fields, *OLD_NAMES]


def _load(values: Mapping[str, Any], overrides: Mapping[str, Any], path: Path | None) -> LoadedConfig:
    base, over = translate(values, TrainConfig.model_fields), translate(overrides, TrainConfig.model_fields)
    merged = {**base.values, **over.values}
    findings = [Finding((), problem) for problem in (*base.problems, *over.problems)]
    findings += [_unknown(key) for key in merged if key not in TrainConfig.model_fields]
    merged = {key: value for key, value in merged.items() if key in TrainConfig.model_fields}
    config, mistakes = _validate(merged)
    findings += mistakes
    wrong = {key for finding in mistakes for key in finding.keys}
    findings += [finding for finding in check(config) if not wrong.intersection(finding.keys)]
    problems = [finding.message for finding in findings if finding.fatal]
    if problems:
        raise ConfigError(_problem_list(problems, path))
    notes = [*base.notes, *over.notes, *(finding.message for finding in findings)]
    return LoadedConfig(config, tuple(dict.fromkeys(notes)), path)


def _unknown(key: str) -> Finding:
    hint = did_you_mean(str(key), known_names()) or " `pyralis config schema` lists all fields."
    return Finding((), f"{key}: unknown field.{hint}")


# stands for a required field that is missing or wrong, so that the other fields can still be checked against each other
_PLACEHOLDERS: dict[str, Any] = {"model_name_or_path": "model", "train_file": "data", "max_seq_length": 2**31}


def _validate(values: dict[str, Any]) -> tuple[TrainConfig, list[Finding]]:
    """The config, and a finding for each field that is wrong; such fields are at their defaults in it."""
    try:
        return TrainConfig(**values), []
    except ValidationError as error:
        wrong = {str(mistake["loc"][0]): mistake["type"] for mistake in error.errors() if mistake["loc"]}
    wrong = {name: kind for name, kind in wrong.items() if kind != "default_factory_not_called"}
    good = {name: value for name, value in values.items() if name not in wrong}
    stand_ins = {name: value for name, value in _PLACEHOLDERS.items() if name in wrong}
    return TrainConfig(**{**stand_ins, **good}), [_mistake(name, kind, values) for name, kind in wrong.items()]


def _mistake(name: str, kind: str, values: Mapping[str, Any]) -> Finding:
    field = TrainConfig.model_fields[name]
    if kind == "missing":
        return Finding((name,), f"{name}: missing; every config needs it. {field.description}")
    value = json.dumps(values[name], ensure_ascii=False, default=str)
    value = "the value given" if name.endswith("_token") else value if len(value) <= 80 else value[:77] + "..."
    if name == "template_name":
        allowed = f"one of {', '.join(TEMPLATE_NAMES)}, or empty for the tokenizer's own"
        hint = did_you_mean(str(values[name]), TEMPLATE_NAMES)
        return Finding((name,), f"{name}: {value} is not allowed; expected {allowed}.{hint}")
    return Finding(
        (name,), f"{name}: {value} is not allowed; expected {describe_type(field.annotation, field.metadata)}."
    )


def _problem_list(problems: Sequence[str], path: Path | None) -> str:
    where = f"{path}: " if path else ""
    if len(problems) == 1:
        return where + problems[0]
    return f"{where}{len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems)
