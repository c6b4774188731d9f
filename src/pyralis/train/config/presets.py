"""The ready configs of train_args/, in Firefly's layout.

`python -m pyralis.train.config.presets train_args` writes them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyralis.train.config.recipes import ZERO3, recipe

TASKS = ("pretrain", "sft", "dpo")
MODES = ("full", "lora", "qlora")


@dataclass(frozen=True)
class PresetModel:
    """A model line: the base model is pretrained further, the chat model is tuned on chats and preferences."""

    name: str
    base: str
    chat: str
    billions: float


MODELS = (
    PresetModel("llama2-7b", "NousResearch/Llama-2-7b-hf", "NousResearch/Llama-2-7b-chat-hf", 6.7),
    PresetModel("llama3-8b", "NousResearch/Meta-Llama-3-8B", "NousResearch/Meta-Llama-3-8B-Instruct", 8.0),
    PresetModel("llama3.1-8b", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", 8.0),
    PresetModel("llama3.2-1b", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct", 1.2),
    PresetModel("llama3.2-3b", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct", 3.2),
    PresetModel("mistral-7b", "mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3", 7.2),
    PresetModel("zephyr-7b", "HuggingFaceH4/zephyr-7b-beta", "HuggingFaceH4/zephyr-7b-beta", 7.2),
    PresetModel(
        "tinyllama-1.1b",
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        1.1,
    ),
    PresetModel("gemma-2b", "google/gemma-2b", "google/gemma-2b-it", 2.5),
    PresetModel("gemma-7b", "google/gemma-7b", "google/gemma-7b-it", 8.5),
    PresetModel("gemma2-9b", "google/gemma-2-9b", "google/gemma-2-9b-it", 9.2),
    PresetModel("phi3-mini", "microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct", 3.8),
    PresetModel("qwen1.5-7b", "Qwen/Qwen1.5-7B", "Qwen/Qwen1.5-7B-Chat", 7.7),
    PresetModel("qwen2-7b", "Qwen/Qwen2-7B", "Qwen/Qwen2-7B-Instruct", 7.6),
    PresetModel("qwen2.5-7b", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", 7.6),
    PresetModel("qwen3-8b", "Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B", 8.2),
    PresetModel("yi-1.5-6b", "01-ai/Yi-1.5-6B", "01-ai/Yi-1.5-6B-Chat", 6.1),
    PresetModel("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", 0.135),
)

# Sharded, nothing offloaded. Optimizer and scheduler are the Trainer's, so the config alone says what they are.
ZERO3_CONFIG: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def presets() -> dict[str, dict[str, Any]]:
    """Path below train_args/ -> content, for every model, task and mode, and the DeepSpeed config they name."""
    files: dict[str, dict[str, Any]] = {Path(ZERO3).name: ZERO3_CONFIG}
    for model in MODELS:
        for task in TASKS:
            for mode in MODES:
                hub_name = model.base if task == "pretrain" else model.chat
                values = recipe(hub_name, task, mode, billions=model.billions, name=model.name)
                files[f"{task}/{mode}/{model.name}-{task}-{mode}.json"] = values
    return files


def preset_text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=4, ensure_ascii=False) + "\n"


def write_presets(folder: Path) -> int:
    """Write every preset below `folder`; returns how many."""
    files = presets()
    for name, values in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(preset_text(values), encoding="utf-8")
    return len(files)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pyralis.train.config.presets FOLDER")
    print(f"wrote {write_presets(Path(sys.argv[1]))} files below {sys.argv[1]}")
