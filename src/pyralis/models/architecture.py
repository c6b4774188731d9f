"""What a model is, told without loading it: by its local config.json, else by a well-known name."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pyralis.errors import ConfigError
from pyralis.models.known_names import REMOTE_CODE, model_type_of


@dataclass(frozen=True)
class Architecture:
    """`name` is transformers' model type, such as "llama", or "unknown"."""

    name: str
    source: Literal["local", "table", "unknown"]
    native: bool  # transformers has it; False where unknown
    remote_code: str | None  # "openbmb/MiniCPM-2B-dpo-fp16: modeling_minicpm.py"
    reason: str


def resolve_architecture(model_name_or_path: str, trust_remote_code: bool = False) -> Architecture:
    """The architecture of a local folder or hub name. An unknown name is accepted: only the hub could tell.

    Raises ConfigError: a folder without a usable config.json, a model that is no causal language model, or one that
    needs code of its own and `trust_remote_code` is false.
    """
    folder = Path(os.path.expanduser(model_name_or_path))
    if os.path.isdir(folder):  # False too for what cannot be a name, for which Path.is_dir raises
        config = _read_config(folder)
        model_type, source = str(config["model_type"]), "local"
        reason = f"{folder / 'config.json'} says model_type {model_type}"
        remote_file = _remote_file(config)
    else:
        known = model_type_of(model_name_or_path)
        if known is None:
            return Architecture(
                "unknown", "unknown", False, None, "unknown offline: no local folder, no well-known name"
            )
        model_type, source = known, "table"
        reason = f"the name is well known as model_type {model_type}"
        remote_file = REMOTE_CODE.get(model_type)
    return _judge(model_name_or_path, model_type, source, reason, remote_file, trust_remote_code)


def _judge(
    name: str, model_type: str, source: Any, reason: str, remote_file: str | None, trust_remote_code: bool
) -> Architecture:
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return Architecture(model_type, source, True, None, reason)
    if model_type in CONFIG_MAPPING_NAMES and not (remote_file and trust_remote_code):
        raise ConfigError(f"{name}: {reason}, which transformers has, but not as a causal language model.")
    if remote_file is None:
        raise ConfigError(
            f"{name}: {reason}, which this transformers does not know, and the folder brings no code of its own. "
            "A newer transformers may know it."
        )
    remote_code = f"{name}: {remote_file}"
    if not trust_remote_code:
        raise ConfigError(
            f"{name} ({model_type}) is not part of transformers; it needs the checkpoint's own code, {remote_file}. "
            "Choose a model that transformers has, or set trust_remote_code: true to run that code (it seldom imports "
            "on transformers 5)."
        )
    return Architecture(model_type, source, False, remote_code, reason)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"{folder} holds an adapter, not a model. Give its base model, and this folder as load_adapter."
            )
        if any(folder.glob("*.gguf")):
            raise ConfigError(
                f"{folder} holds GGUF files only; training needs a folder with config.json and safetensors."
            )
        raise ConfigError(f"{folder} has no config.json; expected a model folder as save_pretrained writes it.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{path} has no model_type; expected a model's config as save_pretrained writes it.")
    return config


def _remote_file(config: dict[str, Any]) -> str | None:
    """The file that `auto_map` names for the causal model: `"repo--modeling_x.XForCausalLM"` -> `"modeling_x.py"`."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, dict) or not auto_map:
        return None
    target = auto_map.get("AutoModelForCausalLM") or auto_map.get("AutoModel") or next(iter(auto_map.values()))
    target = target[0] if isinstance(target, list) and target else target
    return str(target).rpartition("--")[2].partition(".")[0] + ".py"
