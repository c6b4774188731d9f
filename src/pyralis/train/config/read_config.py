"""Config files and overrides as dictionaries: JSON or YAML, duplicate keys refused, errors with line and column."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pyralis.errors import ConfigError
from pyralis.train.config.suggest import did_you_mean

MOST_VALUES = 100_000


def read_config_file(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file, told apart by extension, else by content.

    Raises ConfigError: no such file, not UTF-8, a syntax error (line and column), a key given twice, not a mapping.
    """
    text = _read_text(path)
    as_json = path.suffix == ".json" or (path.suffix not in {".yaml", ".yml"} and text.lstrip().startswith("{"))
    values = _parse_json(text, path) if as_json else _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{path}: expected a mapping of fields to values, found {found}.")
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: the key {key!r} is not text. Write it in quotes.")
    return values


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["lora_rank=8", "bf16=true"]` -> `{"lora_rank": 8, "bf16": True}`; values are YAML, the last of a key counts.
    `template_name=` is the empty text, as a shell means it; null is written `null`."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {override!r}: expected KEY=VALUE, such as learning_rate=1e-4.")
        values[key.strip()] = _parse_yaml(text, f"override {override!r}") if text.strip() else ""
    return values


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [sibling.name for sibling in path.parent.glob("*") if sibling.suffix in {".json", ".yaml", ".yml"}]
        raise ConfigError(f"{path}: no such config file.{did_you_mean(path.name, siblings)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; expected a JSON or YAML config file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). Save the file as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None


def _parse_json(text: str, path: Path) -> Any:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            pattern = re.compile(re.escape(json.dumps(twice, ensure_ascii=False)) + r"\s*:")
            lines = [str(text.count("\n", 0, match.start()) + 1) for match in pattern.finditer(text)]
            raise ConfigError(f"{path}: the key {twice!r} is given twice (lines {', '.join(lines)}). Keep one.")
        return result

    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        raise ConfigError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}."
            + (f"\n    {line.rstrip()}\n    {' ' * (error.colno - 1)}^" if line else "")
            + "\nJSON has no comments and no comma behind the last item; YAML (.yaml) allows comments."
        ) from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid JSON: it is nested too deeply for a config.") from None
    except ValueError as error:  # a number of too many digits
        raise ConfigError(f"{path}: not valid JSON: {error}.") from None


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which plain YAML lets the last one win silently."""


def _strict_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            continue
        line = key_node.start_mark.line + 1
        if key_node.value in seen:
            lines = f"lines {seen[key_node.value]}, {line}"
            raise ConfigError(f"{loader.name}: the key {key_node.value!r} is given twice ({lines}). Keep one.")
        seen[key_node.value] = line
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _strict_mapping)


def _parse_yaml(text: str, name: str) -> Any:
    try:
        loader = _StrictLoader(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    loader.name = name
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_aliases(node, name)
        return loader.construct_document(node)
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}: not valid YAML{place}: {error.problem or error.context}.") from None
    except RecursionError:
        raise ConfigError(f"{name}: not valid YAML: it is nested too deeply for a config.") from None
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # PyYAML's own, of odd scalars
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    finally:
        loader.dispose()


def _check_aliases(node: yaml.Node, name: str) -> None:
    """Raise ConfigError for more than MOST_VALUES with aliases written out, and for an alias inside of what it names: a
    few lines of such would fill any memory."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = MOST_VALUES + 1  # of an alias inside of itself
            parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    if size(node) > MOST_VALUES:
        raise ConfigError(
            f"{name}: its aliases (*name) make it more than {MOST_VALUES:,} values, or stand inside of what they name. "
            "Write out what is meant."
        )
