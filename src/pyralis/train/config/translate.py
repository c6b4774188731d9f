"""Keys of older transformers, TRL, PEFT, Unsloth and LLaMA-Factory, read as today's. The table is in old_names.py."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyralis.train.config.old_names import OLD_NAMES, OLD_VALUES, OldName


@dataclass
class Translation:
    """Values under today's names, what to tell the user, and what keeps the config from being trained."""

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def translate(given: Mapping[str, Any], current: Container[str]) -> Translation:
    """Read old names as today's. A key that is in `current` (a field today) is never translated; one that is neither
    is passed on, to be refused as unknown."""
    result = Translation()
    came_from: dict[str, str] = {}
    for key, value in given.items():
        if key in current or key not in OLD_NAMES:
            result.values[key] = _translate_value(key, value, result)
            came_from[key] = key
    for key, value in given.items():
        if key in current or key not in OLD_NAMES:
            continue
        old = OLD_NAMES[key]
        try:
            today = old.convert(value, given)
        except ValueError as error:
            result.problems.append(f"{key}: {error}")
            continue
        clashes = [
            new
            for new, new_value in today.items()
            if new in result.values and result.values[new] not in (new_value, *old.yields)
        ]
        for new in clashes:
            result.problems.append(
                f"{key}: {_show(value)} means {new}: {_show(today[new])}, but {came_from[new]} says "
                f"{_show(given[came_from[new]])}. Keep one of them."
            )
        if not clashes:
            result.values.update(today)
            came_from.update(dict.fromkeys(today, key))
            result.notes.append(_note(key, value, today, old))
    return result


def _translate_value(key: str, value: Any, result: Translation) -> Any:
    old = OLD_VALUES.get((key, value)) if isinstance(value, str) else None
    if old is None:
        return value
    result.notes.append(f"{key}: {_show(value)} {old.why}; read as {_show(old.new)}.")
    return old.new


def _note(key: str, value: Any, today: Mapping[str, Any], old: OldName) -> str:
    if not today:
        return f"{key}: has no effect: {old.unused}."
    read_as = ", ".join(f"{new}: {_show(new_value)}" for new, new_value in today.items())
    return f"{key}: {old.why}; read as {read_as}."


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
