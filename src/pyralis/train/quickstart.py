"""The run that `make quickstart` shows: a 135M model learns who it is, on two CPU cores in about two minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyralis.train.checkpoints.checkpoint import run_status

MODEL_NAME = "smollm2-135m-instruct"
IDENTITY_FILE = Path(__file__).parents[1] / "data" / "samples" / "identity.jsonl"
QUESTIONS = ("Who are you?", "你是谁？", "Are you made by OpenAI?", "Can you say hello to me?")


def quickstart_config(model_dir: Path, output_dir: Path) -> dict[str, Any]:
    """A config as a user would write it. A finished quickstart is run anew, an interrupted one goes on."""
    return {
        "model_name_or_path": str(model_dir),
        "train_file": str(IDENTITY_FILE),
        "output_dir": str(output_dir),
        "overwrite_output_dir": run_status(output_dir) == "finished",
        "task_type": "sft",
        "train_mode": "lora",
        "max_seq_length": 256,
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        # bfloat16 is slow on most CPUs; float32 is right on all.
        "dtype": "float32",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 40,
        "learning_rate": 1.5e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_steps": 20,
        "save_total_limit": 1,
        "seed": 42,
        "sample_prompts": list(QUESTIONS),
        "sample_max_new_tokens": 40,
    }
