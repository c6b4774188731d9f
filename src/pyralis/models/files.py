"""Whether a checkpoint folder's files are all there, whole, and safe to read; nothing here loads a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pyralis.errors import ModelError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# transformers prefers a checkpoint of torch.distributed, whose metadata is a pickle, to safetensors beside it
DISTRIBUTED_SUFFIX = ".distcp"
# pickles that lie beside weights and are none
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "adapter_model", "tokenizer")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model's folder; ModelError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer's vocabulary (a `tokenizer_config.json` alone is none)."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES) or any(folder.glob("*.tiktoken"))


def check_weights(folder: Path, *, allow_pickle_weights: bool = False) -> None:
    """Raise ModelError unless the folder's weights are all there, whole, and safetensors.

    Only headers are read: a truncated 15 GB file is found in a millisecond.
    """
    files = sorted(folder.glob("*.safetensors"))
    _check_index(folder, {file.name for file in files})
    for file in files:
        _check_safetensors(file)
    distributed = sorted(file.name for file in folder.glob(f"*{DISTRIBUTED_SUFFIX}"))
    pickles = sorted(
        file.name
        for file in folder.iterdir()
        if file.suffix in PICKLE_SUFFIXES and not file.name.startswith(NOT_WEIGHTS)
    )
    if not (files or pickles or distributed):
        raise ModelError(f"{folder} has a config.json but no weights (*.safetensors).")
    if (distributed or (pickles and not files)) and not allow_pickle_weights:
        found = ", ".join((distributed or pickles)[:4])
        raise ModelError(
            f"{folder} has its weights as pickles ({found}), which can run code when they are read. Take the model "
            "from where it has .safetensors, or, if you trust whoever made it, set allow_pickle_weights: true."
        )


def _check_index(folder: Path, present: set[str]) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index} has no weight_map of tensors to files: download it again.")
    names = set(weight_map.values())
    if outside := sorted(name for name in names if Path(name).name != name):
        raise ModelError(f"{index} names {outside[0]!r}, which is no file of that folder: it is not read.")
    missing = sorted(names - present)
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing[:4])}. "
            "Its download was not finished: download it again."
        )


def _check_safetensors(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            if stream.read(40).startswith(b"version https://git-lfs"):
                raise ModelError(f"{file} is a Git LFS pointer, not a weight: run `git lfs pull` in that folder.")
        with safe_open(file, framework="pt"):
            pass
    except OSError as error:  # such as a link to what is not there
        raise ModelError(f"{file} cannot be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged or was not downloaded wholly ({error}): download it again.") from error
