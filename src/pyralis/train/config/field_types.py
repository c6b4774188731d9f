"""The types of config fields: numbers as people and YAML write them, words that YAML 1.1 turns into booleans."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BeforeValidator, Field, WrapValidator


def _numeric(value: Any) -> Any:
    """`"2e-4"` (what YAML 1.1 makes of 2e-4) is a number; `true` is not, though Python says it is 1."""
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    if isinstance(value, str):
        for parse in (int, float):
            try:
                return parse(value)
            except ValueError:
                continue
    return value


def _keep_integer(value: Any, validate: Any) -> float:
    """A whole number stays one: `logging_steps: 100` is written back as 100, not 100.0."""
    value = _numeric(value)
    checked: float = validate(value)
    return value if isinstance(value, int) else checked


Integer = Annotated[int, BeforeValidator(_numeric)]
Number = Annotated[float, Field(allow_inf_nan=False), WrapValidator(_keep_integer)]

OnOff = BeforeValidator(lambda value: {True: "on", False: "off"}[value] if isinstance(value, bool) else value)
"""YAML 1.1 reads `on` and `off` as booleans."""

NotSaid = BeforeValidator(lambda value: "auto" if value is None else value)
"""Configs of other programs write `null` where nothing is meant."""

NoWord = BeforeValidator(lambda value: "no" if value is False else value)
"""YAML 1.1 reads `no` as false."""

_PLAIN_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
    Any: "anything",
}


def literal_values(annotation: Any) -> tuple[Any, ...]:
    """Every value that a `Literal` somewhere in the annotation allows; () where there is none."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for part in get_args(annotation) for value in literal_values(part))


def describe_type(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """What a field takes, in words: `"a whole number from 1 to 1024"`, `"one of 'full', 'lora', 'qlora'"`."""
    return _describe(annotation) + _describe_limits(limits)


def _describe(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _describe(get_args(annotation)[0])
    if origin is Literal:
        values = [repr(value) if isinstance(value, str) else str(value).lower() for value in get_args(annotation)]
        return values[0] if len(values) == 1 else "one of " + ", ".join(values)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in get_args(annotation))
    if origin is list:
        inner = _describe(get_args(annotation)[0])
        return "a list of texts" if inner == "text" else f"a list of ({inner})"
    return _PLAIN_NAMES.get(origin or annotation, str(annotation))


def _describe_limits(limits: Iterable[Any]) -> str:
    words = []
    for limit in limits:
        match limit:
            case annotated_types.Ge(ge):
                words.append(f"at least {ge}")
            case annotated_types.Gt(gt):
                words.append(f"above {gt}")
            case annotated_types.Le(le):
                words.append(f"at most {le}")
            case annotated_types.Lt(lt):
                words.append(f"below {lt}")
            case annotated_types.MinLen(1):
                words.append("not empty")
    return ", " + " and ".join(words) if words else ""
