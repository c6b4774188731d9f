"""One config field of ours: its default, description and origin."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

Origin = Literal["Firefly", "Pyralis", "transformers"]


def own_field(
    default: Any, description: str, *, origin: Origin = "Pyralis", default_text: str = "", **limits: Any
) -> Any:
    """A field; a function as default computes it from the fields before it, and `default_text` says how."""
    extra: dict[str, Any] = {"x-origin": origin} | ({"x-default": default_text} if default_text else {})
    if callable(default):
        return Field(default_factory=default, description=description, json_schema_extra=extra, **limits)
    return Field(default, description=description, json_schema_extra=extra, **limits)
