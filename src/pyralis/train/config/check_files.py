"""Rules about what lies around the config: the model's folder, and the files that fields name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyralis.errors import ConfigError
from pyralis.models.fetch import hub_is_reachable
from pyralis.train.config.findings import Finding, note

if TYPE_CHECKING:
    from pyralis.train.config.train_config import TrainConfig


def check_files(config: TrainConfig) -> None:
    """What only a run needs: the files beside the config that it names, and the hub where it is to be pushed to.

    Raises ConfigError for what is missing.
    """
    missing = [f"{name}: there is no {path}" for name, path in _files_named(config) if not os.path.exists(path)]
    if missing:
        raise ConfigError(". ".join(missing) + ". Paths are relative to the folder the command is started in.")
    if config.push_to_hub and not hub_is_reachable():
        raise ConfigError(
            "push_to_hub: the hub cannot be reached from here. Set it to false, and upload the result later."
        )


def model_rule(config: TrainConfig) -> Iterator[Finding]:
    """The architecture must be one that transformers has, as far as it can be told."""
    try:
        architecture = config.architecture
    except ConfigError as error:
        yield Finding(("model_name_or_path",), f"model_name_or_path: {error}")
        return
    if architecture.remote_code:
        yield note(
            "model_name_or_path",
            message=f"trust_remote_code: {architecture.remote_code} will be run. Such code is written for older "
            "transformers and seldom imports on transformers 5.",
        )
    name = config.model_name_or_path
    if name.startswith(("/", "./", "../", "~")) and not os.path.isdir(os.path.expanduser(name)):
        yield note("model_name_or_path", message=f"model_name_or_path: there is no folder {name} here; a run needs it.")


def files_rule(config: TrainConfig) -> Iterator[Finding]:
    """A file that is missing may yet come, so it is a note here and an error at the start of a run."""
    for name, path in _files_named(config):
        if not os.path.exists(path):
            yield note(name, message=f"{name}: there is no {path} here; a run needs it.")
        elif Path(path).is_file() != (name != "load_adapter"):
            expected = "the folder of an adapter" if name == "load_adapter" else "a JSON file"
            yield Finding((name,), f"{name}: {path} is not {expected}.")
        elif name != "load_adapter":
            try:
                json.loads(Path(path).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                yield Finding((name,), f"{name}: {path} is not valid JSON: {error}.")


def _files_named(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Fields that name a file or folder beside the config, and that path."""
    for name in ("deepspeed", "fsdp_config", "accelerator_config", "load_adapter"):
        value: Any = getattr(config, name)
        if isinstance(value, str) and value and not value.lstrip().startswith("{"):
            yield name, value
