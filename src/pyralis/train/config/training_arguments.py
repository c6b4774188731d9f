"""`transformers.TrainingArguments` as a pydantic model: its fields, types, defaults and help, read from the installed
dataclass. Nothing of it is built, since building looks at the GPU, at deepspeed and at the files named."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Container
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, Field, create_model
from transformers.training_args import TrainingArguments

from pyralis.compat import training_argument_fields
from pyralis.train.config.field_types import Integer, NoWord, Number

# What TrainingArguments takes but its type hints do not say.
_WIDER_TYPES: dict[str, Any] = {
    "fsdp": bool | str | list[str] | None,
    "include_num_input_tokens_seen": bool | Annotated[Literal["all", "non_padding", "no"], NoWord],
}

_POSITIVE: dict[str, Any] = {"gt": 0}
_AT_LEAST_0: dict[str, Any] = {"ge": 0}
_AT_LEAST_1: dict[str, Any] = {"ge": 1}
_LIMITS: dict[str, dict[str, Any]] = {
    "per_device_train_batch_size": _AT_LEAST_1,
    "per_device_eval_batch_size": _AT_LEAST_1,
    "gradient_accumulation_steps": _AT_LEAST_1,
    "eval_accumulation_steps": _AT_LEAST_1,
    "torch_empty_cache_steps": _AT_LEAST_1,
    "save_total_limit": _AT_LEAST_0,
    "num_train_epochs": _POSITIVE,
    "max_steps": {"ge": -1},
    "warmup_steps": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "max_grad_norm": _AT_LEAST_0,
    "adam_beta1": {"ge": 0, "lt": 1},
    "adam_beta2": {"ge": 0, "lt": 1},
    "adam_epsilon": _POSITIVE,
    "label_smoothing_factor": {"ge": 0, "lt": 1},
    "save_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "eval_delay": _AT_LEAST_0,
    "dataloader_num_workers": _AT_LEAST_0,
    "dataloader_prefetch_factor": _AT_LEAST_1,
    "seed": {"ge": 0, "lt": 2**32},
    "data_seed": {"ge": 0, "lt": 2**32},
}


def training_arguments_model(exclude: Container[str]) -> type[BaseModel]:
    """A model with one field for each TrainingArguments field that is not in `exclude`."""
    hints = get_type_hints(TrainingArguments)
    fields: dict[str, Any] = {}
    for name, field in training_argument_fields().items():
        if name not in exclude:
            fields[name] = (_WIDER_TYPES.get(name) or _field_type(hints[name], field.metadata), _field_info(field))
    return create_model("TrainingArgumentsFields", **fields)


def dataclass_arguments() -> dict[str, type]:
    """Fields that take a dataclass, which a config writes as a mapping: name -> that class."""
    hints = get_type_hints(TrainingArguments)
    found = {}
    for name in training_argument_fields():
        for part in (hints[name], *get_args(hints[name])):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                found[name] = part
    return found


def _field_info(field: dataclasses.Field[Any]) -> Any:
    help_text = " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())
    extra: dict[str, Any] = {"x-origin": "transformers"}
    limits: dict[str, Any] = _LIMITS.get(field.name, {})
    if field.default_factory is not dataclasses.MISSING:
        return Field(default_factory=field.default_factory, description=help_text, json_schema_extra=extra, **limits)
    default = field.default.value if isinstance(field.default, Enum) else field.default
    return Field(default, description=help_text, json_schema_extra=extra, **limits)


def _field_type(hint: Any, metadata: Any) -> Any:
    choices = metadata.get("choices")
    if choices:
        closed: Any = Literal[tuple(choices)]
        return closed | None if type(None) in get_args(hint) else closed
    return _checked(hint)


def _checked(hint: Any) -> Any:
    """The type that checks what `hint` promises: enums by their values, dataclasses as mappings, lenient numbers."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        parts = get_args(hint)
        if any(_is_enum(part) for part in parts):  # `SchedulerType | str` means: a value of SchedulerType
            parts = tuple(part for part in parts if part is not str)
        return Union[tuple(_checked(part) for part in parts)]  # noqa: UP007 (built at run time)
    if origin is list:
        return list[_checked(get_args(hint)[0])]  # type: ignore[misc]
    if _is_enum(hint):
        closed: Any = Literal[tuple(member.value for member in hint)]
        return Annotated[closed, NoWord] if "no" in get_args(closed) else closed
    if hint is dict or origin is dict or (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return dict[str, Any]
    return {int: Integer, float: Number}.get(hint, hint)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)
