from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyralis.errors import ConfigError
from pyralis.train.config.check_files import check_files
from pyralis.train.config.train_config import LoadedConfig, config_from_dict

MINIMAL: dict[str, Any] = {"model_name_or_path": "me/some-model", "train_file": "rows.jsonl", "max_seq_length": 64}


def load(**values: Any) -> LoadedConfig:
    return config_from_dict({**MINIMAL, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both true"),
        ({"bf16_full_eval": True, "fp16_full_eval": True}, "at most one"),
        ({"task_type": "dpo", "packing": True, "max_prompt_length": 32}, "pairs are not packed"),
        ({"task_type": "dpo", "max_prompt_length": 64}, "leaves no room for answers"),
        ({"task_type": "pretrain", "data_format": "alpaca"}, "expected auto or text"),
        ({"data_format": "preference"}, "dpo only"),
        ({"train_mode": "full", "load_adapter": "out"}, "load_adapter"),
        ({"init_lora_weights": "xavier"}, "gaussian"),
        ({"init_lora_weights": "pissa"}, "'gaussian'"),
        ({"max_steps": 0}, "max_steps: 0 trains nothing; expected at least 1, or -1"),
        ({"init_lora_weights": "orthogonal"}, "cannot start from 4-bit weights"),
        ({"eval_strategy": "steps"}, "needs evaluation data"),
        ({"eval_file": "a.jsonl", "eval_split": 0.1}, "keep one"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "steers by the evaluation loss"),
        ({"load_best_model_at_end": True}, "to be the same, but they are no and steps"),
        (
            {
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "eval_split": 0.1,
                "eval_steps": 30,
                "save_steps": 100,
            },
            "multiple of eval_steps",
        ),
        ({"logging_steps": 2.5}, "must be whole"),
        ({"warmup_steps": 1.5}, "must be whole"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
        ({"use_unsloth": True, "acceleration": "off"}, "Keep one of them"),
        ({"acceleration": "on", "use_liger_kernel": True}, "replace the same layers"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}, "fsdp": True}, "keep one"),
        ({"report_to": ["tensorbord"]}, "Did you mean 'tensorboard'"),
        ({"overwrite_output_dir": True, "resume_from_checkpoint": True}, "starts anew"),
        ({"template_name": "lama3"}, "Did you mean 'llama3'"),
        ({"lora_dropout": 1.0}, "below 1"),
        ({"model_name_or_path": "THUDM/chatglm3-6b"}, r"modeling_chatglm\.py"),
    ],
)
def test_what_does_not_fit_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"init_lora_weights": "orthogonal", "train_mode": "lora"},
        {
            "load_best_model_at_end": True,
            "eval_split": 0.1,
            "eval_strategy": "steps",
            "eval_steps": 0.1,
            "save_steps": 0.3,
        },
        {
            "load_best_model_at_end": True,
            "eval_split": 0.1,
            "eval_strategy": "steps",
            "eval_steps": 50,
            "save_steps": 100,
        },
        {"load_best_model_at_end": True, "eval_split": 0.1, "save_strategy": "best"},
        {"deepspeed": {"zero_optimization": {"stage": 3}}, "train_mode": "qlora"},
        {"overwrite_output_dir": True},
        {"task_type": "dpo", "max_prompt_length": 32},
        {"dtype": "bfloat16", "bf16": True},
    ],
)
def test_what_fits(values: dict[str, Any]) -> None:
    assert load(**values).notes == ()


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"train_mode": "full", "lora_rank": 8}, "lora_rank: has no effect: train_mode is full"),
        ({"beta": 0.2, "max_prompt_length": 32}, "beta, max_prompt_length: have no effect"),
        ({"task_type": "pretrain", "template_name": "qwen"}, "template_name: has no effect"),
        ({"max_steps": 5, "num_train_epochs": 2}, "num_train_epochs: has no effect"),
        ({"fp16": True, "use_cpu": True}, "fp16: on a CPU training computes in float32"),
        ({"fp16": True, "dtype": "bfloat16"}, "counts before dtype"),
        ({"use_unsloth": True}, "accelerated path"),
        ({"deepspeed": "./nowhere/ds.json"}, "there is no ./nowhere/ds.json here"),
        ({"model_name_or_path": "./nowhere/model"}, "there is no folder"),
        ({"model_name_or_path": "Qwen/Qwen-7B", "trust_remote_code": True}, "seldom imports"),
        ({"eval_file": "a.jsonl", "eval_strategy": "no"}, "is not used"),
    ],
)
def test_notes(values: dict[str, Any], note: str) -> None:
    assert any(note in found for found in load(**values).notes)


def test_firefly_full_configs_repeat_lora_defaults_without_a_note() -> None:
    assert load(train_mode="full", lora_rank=64, lora_alpha=16, lora_dropout=0.05).notes == ()


def test_a_wrong_field_does_not_raise_follow_up_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        load(eval_file=3, eval_strategy="steps")
    assert str(caught.value) == "eval_file: 3 is not allowed; expected text or a list of texts."


def test_files_are_needed_by_a_run_only(tmp_path: Path) -> None:
    missing = tmp_path / "ds.json"
    config = load(deepspeed=str(missing)).config
    with pytest.raises(ConfigError, match=r"deepspeed: there is no .*ds\.json"):
        check_files(config)
    missing.write_text("{}", encoding="utf-8")
    check_files(config)
    missing.write_text("{,}", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load(deepspeed=str(missing))
    with pytest.raises(ConfigError, match="not the folder of an adapter"):
        load(load_adapter=str(missing))
