"""What a `model_name_or_path` points at: a folder, a GGUF file, an adapter and its base, a demo model, a hub name."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from pyralis.errors import ModelError
from pyralis.models.demo import find_demo_model
from pyralis.models.fetch import fetch_model, hub_is_reachable
from pyralis.models.files import read_json

# transformers puts such an adapter into the model as it loads it, as layers that nothing here knows of.
ADAPTER_WITHIN = (
    "{} holds a whole model and an adapter (adapter_config.json): which is meant? Move the adapter's two files into a "
    "folder of their own; then either folder loads."
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the base model's files are.

    Attributes:
        path: a local folder, or a hub name.
        adapter: the adapter folder that was named, if it was one; `path` is then its base model.
        gguf_file: the name of the GGUF file inside `path` that holds the weights, if it is one.
    """

    path: str
    adapter: Path | None = None
    gguf_file: str | None = None

    @property
    def location(self) -> str:
        """The base model as one name or path."""
        return str(Path(self.path) / self.gguf_file) if self.gguf_file else self.path

    @property
    def is_local(self) -> bool:
        return Path(self.path).is_dir()


def locate_model(model_name_or_path: str, *, revision: str | None = None, base: str | None = None) -> ModelSource:
    """Resolve a name or path; a demo model (`pyralis fetch --list`) is fetched when it is not in the cache.

    Args:
        revision: a hub branch, tag or commit; a demo model's name then goes to the hub.
        base: for an adapter, the base model to take instead of the one that its `adapter_config.json` names.

    Raises:
        ModelError: no such folder, or a folder without a model in it.
        FetchError: a demo model that no source gave.
    """
    path = Path(os.path.expanduser(model_name_or_path))
    if os.path.isdir(path):
        return _locate_in_folder(path, revision, base)
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise ModelError(f"There is no file {path}.")
        return ModelSource(str(path.parent), gguf_file=path.name)
    if os.path.isfile(path):
        raise ModelError(f"{path} is a file; expected a model's folder, a .gguf file or a hub name.")
    if _to_be_fetched(model_name_or_path, revision):
        return ModelSource(str(fetch_model(model_name_or_path)))
    if looks_like_path(model_name_or_path):
        raise ModelError(
            f"There is no folder {model_name_or_path}; expected a model's folder or a hub name `owner/name`."
        )
    return ModelSource(model_name_or_path)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model: some tools save the base's config.json with it."""
    weights = (file for pattern in ("*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern))
    whole = (folder / "config.json").is_file() and any(file.name != "adapter_model.safetensors" for file in weights)
    return (folder / "adapter_config.json").is_file() and not whole


def looks_like_path(name: str) -> bool:
    """Whether a name cannot be a hub name, which is `name` or `owner/name`, of at most 96 characters each."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        return True
    return "\\" in name or "\0" in name or len(name) > 2 * 96 + 1


def _to_be_fetched(name: str, revision: str | None) -> bool:
    """A demo model's own name always; its hub name where neither the hub's cache nor the hub can give it."""
    demo = find_demo_model(name)
    if demo is None or revision is not None:
        return False
    if name.casefold() == demo.name:
        return True
    return not isinstance(try_to_load_from_cache(demo.hub, "config.json"), str) and not hub_is_reachable()


def _locate_in_folder(path: Path, revision: str | None, base: str | None) -> ModelSource:
    if is_adapter(path):
        name = base or _adapter_base(path)
        found = locate_model(name, revision=revision)
        if found.adapter is not None:
            raise ModelError(
                f"The base model of the adapter {path} is itself an adapter, {name}: merge that one first."
            )
        return replace(found, adapter=path)
    if (path / "config.json").is_file():
        return ModelSource(str(path))
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ModelSource(str(path), gguf_file=ggufs[0])
    if ggufs:
        raise ModelError(f"{path} holds {len(ggufs)} GGUF files: name one of them, as in {path / ggufs[0]}.")
    found_names = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
    raise ModelError(
        f"{path} is not a model: it has neither config.json, adapter_config.json nor a .gguf; in it: {found_names}."
    )


def _adapter_base(path: Path) -> str:
    name = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ModelError(f"{path / 'adapter_config.json'} names no base model: give it with --base.")
    base = Path(os.path.expanduser(name))
    there = os.path.exists(base)  # False too for what cannot be a name, for which Path.exists raises
    if not there and not base.is_absolute() and os.path.isdir(path / base):
        return str(path / base)
    if not there and looks_like_path(name):
        if find_demo_model(base.name) is not None:  # it lay in another machine's cache
            return base.name
        raise ModelError(
            f"The adapter {path} was trained on {name}, which is not there: give the base model with --base."
        )
    return str(name)
