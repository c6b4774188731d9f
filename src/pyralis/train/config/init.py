"""`pyralis init`: a commented config to start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from pyralis.errors import ConfigError
from pyralis.train.config.presets import preset_text
from pyralis.train.config.recipes import ZERO3, billions_of, recipe
from pyralis.train.config.train_config import TrainConfig, config_from_dict

# A base model's tokenizer has no chat template; these are the families whose own is among the named ones.
_BASE_TEMPLATES = {
    "gemma": "gemma",
    "gemma2": "gemma",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "phi3": "phi3",
    "qwen2": "qwen",
    "qwen2_moe": "qwen",
    "qwen3": "qwen",
}
_CHAT_WORDS = ("chat", "instruct", "-it", "zephyr", "vicuna", "hermes", "openchat", "dpo", "rlhf", "tulu")
_NO_ENDING = {"qwen3", "phi3"}  # chat models without a word for it in their names: Qwen3-8B; its base says so


def starting_config(model: str, task: str, mode: str, train_file: str | None = None) -> dict[str, Any]:
    """A config for `model` that passes the check. Raises ConfigError for an unknown task, mode or unusable model."""
    for name, value, allowed in (
        ("--task", task, ("sft", "pretrain", "dpo")),
        ("--mode", mode, ("full", "lora", "qlora")),
    ):
        if value not in allowed:
            raise ConfigError(f"{name} {value} is not allowed; expected one of {', '.join(allowed)}.")
    values = recipe(model, task, mode, billions=billions_of(model))
    if not Path(ZERO3).is_file():
        values.pop("deepspeed", None)  # it lies in a clone of Pyralis; several GPUs can also be had by fsdp
    if train_file is not None:
        values["train_file"] = train_file
    config = config_from_dict(values).config
    if task != "pretrain":
        values["template_name"] = guess_template(model, config.architecture.name)
    return values


def guess_template(model: str, architecture: str) -> str:
    """The named template for a base model; "" for a chat model, whose tokenizer has its own."""
    folder = Path(model).expanduser()
    if (folder / "chat_template.jinja").is_file() or "chat_template" in _tokenizer_config(folder):
        return ""
    lower = model.lower()
    if any(word in lower for word in _CHAT_WORDS) or (architecture in _NO_ENDING and "base" not in lower):
        return ""
    if architecture == "llama":
        families = (
            ("llama-2", "llama2"),
            ("llama2", "llama2"),
            ("llama-3", "llama3"),
            ("llama3", "llama3"),
            ("yi-", "yi"),
        )
        return next((template for part, template in families if part in lower), "default")
    return _BASE_TEMPLATES.get(architecture, "default" if architecture != "unknown" else "")


def commented_yaml(values: dict[str, Any]) -> str:
    """YAML with the meaning of each field beside it."""
    lines = ["# Check: pyralis train THIS_FILE --check    All fields: pyralis config schema", ""]
    for name, value in values.items():
        meaning = (TrainConfig.model_fields[name].description or "").split(". ")[0].rstrip(" .")
        lines.append(f"{f'{name}: {_yaml(value)}':<56} # {meaning}")
    return "\n".join(lines) + "\n"


def write_starting_config(
    model: str, task: str, mode: str, *, train_file: str | None = None, out: Path | None = None, overwrite: bool = False
) -> Path:
    """Write a starting config to `out` (default `<model>-<task>-<mode>.yaml` here) and return its path."""
    values = starting_config(model, task, mode, train_file)
    path = out or Path(Path(values["output_dir"]).name + ".yaml")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} is there already; give another --out, or --force to write over it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(preset_text(values) if path.suffix == ".json" else commented_yaml(values), encoding="utf-8")
    return path


def _yaml(value: Any) -> str:
    """A scalar; `1.0e-05`, since YAML 1.1 reads 1e-05 as text."""
    return yaml.safe_dump(value).splitlines()[0] if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}
