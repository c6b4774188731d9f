"""What a config may hold, for editors (JSON Schema) and for people (`pyralis config explain`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from pyralis.errors import ConfigError
from pyralis.train.config.field_types import describe_type, literal_values
from pyralis.train.config.old_names import OLD_NAMES
from pyralis.train.config.suggest import did_you_mean
from pyralis.train.config.train_config import TrainConfig, known_names

_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config: today's fields, and old names marked deprecated."""
    schema = TrainConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Pyralis config"
    schema["description"] = "One flat file: Pyralis's fields, Firefly's, and those of transformers.TrainingArguments."
    for field in schema["properties"].values():
        for part in field.get("anyOf", ()):  # pydantic leaves limits of optional numbers under its own names
            for limit in _LIMITS.keys() & part.keys():
                part[_LIMITS[limit]] = part.pop(limit)
    for name, old in OLD_NAMES.items():
        if name not in schema["properties"]:
            means = f"Read as {', '.join(old.new)}." if old.new else "Not used."
            schema["properties"][name] = {"deprecated": True, "description": f"{means} ({old.origin}: {old.why})"}
    return schema


@dataclass(frozen=True)
class Explanation:
    """What a person wants to know about one field; texts only."""

    key: str
    type: str
    default: str
    allowed: tuple[str, ...]
    meaning: str
    origin: str
    old_names: tuple[str, ...]


def explain(key: str) -> Explanation:
    """Explain a field, or the field that an old name is read as.

    Raises ConfigError: an unknown name (with the nearest), or an old name that is no field any more (with the reason).
    """
    if key not in TrainConfig.model_fields:
        if key not in OLD_NAMES:
            raise ConfigError(f"{key}: unknown field.{did_you_mean(key, known_names())}")
        old = OLD_NAMES[key]
        if len(old.new) != 1:
            raise ConfigError(f"{key} is no field today ({old.origin}): {old.why}.")
        key = old.new[0]
    field = TrainConfig.model_fields[key]
    return Explanation(
        key=key,
        type=describe_type(field.annotation, field.metadata),
        default=default_text(field),
        allowed=tuple(map(str, literal_values(field.annotation))),
        meaning=field.description or "",
        origin=_extra(field, "x-origin"),
        old_names=tuple(f"{name} ({old.origin})" for name, old in OLD_NAMES.items() if key in old.new),
    )


def default_text(field: FieldInfo) -> str:
    """A field's default as a config would write it, or in words where it depends on other fields."""
    if text := _extra(field, "x-default"):
        return text
    if field.is_required():
        return "required"
    return json.dumps(field.get_default(call_default_factory=True, validated_data={}))


def _extra(field: FieldInfo, name: str) -> str:
    extra = field.json_schema_extra
    return str(extra.get(name, "")) if isinstance(extra, dict) else ""
