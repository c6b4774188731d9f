"""The only file that knows what differs between library versions. It asks what a library has, not its number."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from importlib import metadata
from typing import Any


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of packages by name, for reports and results; those that are absent are left out."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def training_argument_fields() -> dict[str, dataclasses.Field[Any]]:
    """The fields that the installed `transformers.TrainingArguments` takes, by name. Nothing is built."""
    from transformers.training_args import TrainingArguments

    return {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}


# transformers 5.23 renamed these two and warns about the old names; 5.17 knows only the old ones.
CHECKPOINTING_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def checkpointing_argument(name: str) -> str:
    """What the installed transformers calls `gradient_checkpointing` or `gradient_checkpointing_kwargs`."""
    newer = CHECKPOINTING_NAMES[name]
    return newer if newer in training_argument_fields() else name


def rename_checkpointing(arguments: Any) -> None:
    """Move the checkpointing of arguments that are being built to its newer names, where transformers has them. TRL's
    configs have it on under the older one, which would warn whoever never named it."""
    for old in CHECKPOINTING_NAMES:
        new = checkpointing_argument(old)
        if getattr(arguments, new) is None:
            setattr(arguments, new, getattr(arguments, old))


def demand_checkpointing(arguments: Any) -> None:
    """Switch gradient checkpointing on in `TrainingArguments` that are built: a Trainer of transformers 5.23 reads the
    newer name, one before it and TRL the older."""
    for name in ("gradient_checkpointing", CHECKPOINTING_NAMES["gradient_checkpointing"]):
        if hasattr(arguments, name):
            setattr(arguments, name, True)


def switch_checkpointing(model: Any, on: bool) -> None:
    """Turn a transformers model's gradient checkpointing on (without reentrance) or off, by the method it has."""
    new = f"activation_checkpointing_{'enable' if on else 'disable'}"
    switch = getattr(model, new, None) or getattr(model, new.replace("activation", "gradient"))
    switch({"use_reentrant": False}) if on else switch()


# What a model's forward calls its KV cache: transformers 5.24 renamed `past_key_values`, and warns about the old name.
CACHE_ARGUMENTS = ("past_key_values", "cache")

LAUNCHER_BEGINS = ("gridX", "gridY", "gridZ", "stream", "function")
LAUNCHER_GOES_ON = ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook")


def is_known_launcher(run: Callable[..., None]) -> bool:
    """Whether a compiled Triton kernel's `run` takes the arguments that Triton 3.6 to 3.9 give it: a grid of three, a
    stream, the function, two kinds of metadata, two hooks, then the kernel's. 3.6 leaves all but five to `*args`."""
    parameters = inspect.signature(run).parameters.values()
    named = tuple(p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL)
    return named in (LAUNCHER_BEGINS, LAUNCHER_BEGINS + LAUNCHER_GOES_ON) and len(parameters) == len(named) + 1


@cache
def launches_are_watched() -> Callable[[], bool]:
    """A function that tells whether a profiler has hooks on Triton's launches now."""
    from triton import knobs

    runtime = knobs.runtime

    def watched() -> bool:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        return bool(
            getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
        )  # a chain of hooks, a hook or None

    return watched
