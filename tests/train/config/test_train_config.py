from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from pyralis.compat import training_argument_fields
from pyralis.errors import ConfigError
from pyralis.train.config.train_config import TrainConfig, config_from_dict, load_config

MINIMAL: dict[str, Any] = {"model_name_or_path": "me/some-model", "train_file": "rows.jsonl", "max_seq_length": 64}

# What a Firefly SFT-QLoRA config looks like.
FIREFLY = """{
    "output_dir": "output/firefly-demo", "model_name_or_path": "Qwen/Qwen2-7B-Instruct",
    "train_file": "./data/demo.jsonl", "template_name": "qwen", "num_train_epochs": 1,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "learning_rate": 2e-4,
    "max_seq_length": 1024, "logging_steps": 100, "save_steps": 100, "save_total_limit": 1,
    "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 100, "lora_rank": 64, "lora_alpha": 16,
    "lora_dropout": 0.05, "use_unsloth": false, "gradient_checkpointing": true, "disable_tqdm": false,
    "optim": "paged_adamw_32bit", "seed": 42, "fp16": true, "report_to": "tensorboard",
    "dataloader_num_workers": 0, "save_strategy": "steps", "weight_decay": 0, "max_grad_norm": 0.3,
    "remove_unused_columns": false
}"""


def problems_of(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({**MINIMAL, **values})
    return str(caught.value)


def config_of(**values: Any) -> TrainConfig:
    return config_from_dict({**MINIMAL, **values}).config


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_firefly_config_is_read_as_it_stands(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "demo.json", FIREFLY)).config
    assert (config.task_type, config.train_mode, config.acceleration) == ("sft", "qlora", "off")
    assert (config.gradient_checkpointing, config.requested_dtype) == ("auto", "float16")
    assert (config.warmup_steps, config.max_grad_norm, config.architecture.name) == (100, 0.3, "qwen2")


def test_every_training_argument_is_a_field() -> None:
    aliases = {"activation_checkpointing", "activation_checkpointing_kwargs"}
    assert set(training_argument_fields()) - aliases <= set(TrainConfig.model_fields)


def test_defaults_look_at_other_fields() -> None:
    sft = config_of()
    assert (sft.output_dir, sft.learning_rate, sft.packing) == ("output/some-model-sft-qlora", 2e-4, False)
    full = config_of(train_mode="full", task_type="pretrain", model_name_or_path="/models/tiny/")
    assert (full.output_dir, full.learning_rate, full.packing) == ("output/tiny-pretrain-full", 1e-5, True)
    pairs = {"task_type": "dpo", "max_prompt_length": 32}
    rates = [config_of(**pairs, train_mode=mode).learning_rate for mode in ("full", "lora", "qlora")]
    assert rates == [5e-7, 5e-6, 5e-6]
    assert config_of(eval_file="more.jsonl").eval_strategy == "epoch"
    assert config_of(use_unsloth=True).acceleration == "on"
    assert config_of().acceleration == "auto"


def test_numbers_in_text_and_yaml_words(tmp_path: Path) -> None:
    text = (
        "model_name_or_path: me/m\ntrain_file: [a.jsonl, b.jsonl]\nmax_seq_length: 1e3\nlearning_rate: 2e-4\n"
        "acceleration: off\nsave_strategy: no\nlogging_steps: '5'\n"
    )
    config = load_config(write(tmp_path, "c.yaml", text)).config
    assert (config.max_seq_length, config.learning_rate, config.logging_steps) == (1000, 2e-4, 5)
    assert (config.acceleration, config.save_strategy, config.train_file) == ("off", "no", ["a.jsonl", "b.jsonl"])


def test_format_by_content(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "a.conf", json.dumps(MINIMAL))).config == config_of()
    yaml_text = "\n".join(f"{key}: {value}" for key, value in MINIMAL.items())
    assert load_config(write(tmp_path, "b.conf", yaml_text)).config == config_of()


def test_overrides_count_before_the_file_and_may_use_old_names(tmp_path: Path) -> None:
    path = write(tmp_path, "c.json", json.dumps({**MINIMAL, "evaluation_strategy": "no", "lora_rank": 64}))
    config = load_config(
        path, ["lora_rank=8", "eval_strategy=steps", "eval_split=0.1", "lora_target_modules=[q, v]"]
    ).config
    assert (config.lora_rank, config.eval_strategy, config.lora_target_modules) == (8, "steps", ["q", "v"])
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        load_config(path, ["lora_rank"])


def test_an_override_without_a_value_is_the_empty_text(tmp_path: Path) -> None:
    path = write(tmp_path, "c.json", json.dumps({**MINIMAL, "template_name": "qwen", "system": "x"}))
    config = load_config(path, ["template_name=", "system=null"]).config
    assert (config.template_name, config.system) == ("", None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{\n  "a": 1,\n}', "line 3, column 1"),
        ("a.json", '{\n  "seed": 1,\n  "x": 2,\n  "seed": 2\n}', "'seed' is given twice \\(lines 2, 4\\)"),
        ("a.yaml", "seed: 1\nx: 2\nseed: 2\n", "'seed' is given twice \\(lines 1, 3\\)"),
        ("a.yaml", "a: [1,\nb: 2", "not valid YAML at line"),
        ("a.yaml", "- a\n", "expected a mapping"),
        ("a.yaml", "", "found nothing"),
        ("a.yaml", "1: a\n", "key 1 is not text"),
        ("a.json", "", "not valid JSON"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, name, text))


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "llama-sft.json", "{}")
    with pytest.raises(ConfigError, match=r"Did you mean 'llama-sft\.json'"):
        load_config(tmp_path / "lama-sft.json")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


def test_all_problems_at_once() -> None:
    text = problems_of(lora_rnk=8, lora_rank=0, learning_rate="fast", bf16=True, fp16=True, optim="adam", seed=True)
    assert text.startswith("6 problems")
    assert "lora_rnk: unknown field. Did you mean 'lora_rank'" in text
    assert "lora_rank: 0 is not allowed; expected a whole number, at least 1 and at most 1024." in text
    assert 'learning_rate: "fast" is not allowed; expected a number, at least 0.' in text
    assert "bf16 and fp16 are both true" in text
    assert "'adamw_torch'" in text
    assert "seed: true is not allowed; expected a whole number" in text


def test_missing_required_fields() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict({"bf16": True, "fp16": True})
    assert all(word in str(caught.value) for word in ("model_name_or_path: missing", "max_seq_length: missing", "bf16"))


def test_a_token_is_never_shown_or_saved() -> None:
    assert "secret" not in problems_of(hub_token=["secret"])
    config = config_of(hub_token="secret")
    assert "hub_token" not in config.effective()
    assert config.training_arguments()["hub_token"] == "secret"


def test_nearest_names_for_common_words() -> None:
    assert "learning_rate" in problems_of(lr=1e-4)
    assert "per_device_train_batch_size" in problems_of(train_batch_size=1)
    assert "num_train_epochs" in problems_of(epochs=1)


def test_training_arguments_are_what_transformers_takes(tmp_path: Path) -> None:
    config = config_of(output_dir=str(tmp_path), use_cpu=True, warmup_ratio=0.1, optim="adamw_hf", lora_rank=8)
    arguments = TrainingArguments(**config.training_arguments())
    assert arguments.get_warmup_steps(50) == 5
    assert arguments.optim.value == "adamw_torch"
    assert (arguments.logging_steps, arguments.remove_unused_columns, arguments.report_to) == (10, False, [])


@pytest.mark.parametrize(("value", "enabled"), [(True, False), ("auto", False), ("full", True), (False, False)])
def test_only_full_checkpointing_is_the_trainers(tmp_path: Path, value: Any, enabled: bool) -> None:
    kwargs = {"use_reentrant": False}
    config = config_of(output_dir=str(tmp_path), gradient_checkpointing=value, activation_checkpointing_kwargs=kwargs)
    arguments = TrainingArguments(**config.training_arguments())
    assert bool(arguments.gradient_checkpointing) is enabled
    assert arguments.gradient_checkpointing_kwargs == kwargs


def test_training_arguments_hand_out_copies() -> None:
    config = config_of(deepspeed={"zero_optimization": {"stage": 2}})
    config.training_arguments()["deepspeed"]["zero_optimization"]["stage"] = 3
    assert config.deepspeed == {"zero_optimization": {"stage": 2}}


def test_parallelism_is_built_only_for_the_trainer() -> None:
    config = config_of(parallelism_config={"dp_shard_size": 1})
    assert type(config.training_arguments()["parallelism_config"]).__name__ == "ParallelismConfig"


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config_of().lora_rank = 8


# A legal value or two of fields of every kind; no two of them contradict each other.
VALUES: dict[str, Any] = {
    "learning_rate": st.floats(1e-7, 1e-2),
    "num_train_epochs": st.one_of(st.integers(1, 9), st.floats(0.1, 9)),
    "max_steps": st.sampled_from([-1, 20]),
    "warmup_steps": st.one_of(st.integers(0, 99), st.floats(0, 0.99)),
    "lr_scheduler_type": st.sampled_from(["cosine", "linear", "constant_with_warmup"]),
    "lr_scheduler_kwargs": st.sampled_from([None, {"num_cycles": 2}]),
    "optim": st.sampled_from(["adamw_torch", "paged_adamw_8bit", "sgd"]),
    "bf16": st.booleans(),
    "gradient_checkpointing": st.sampled_from([True, False, "auto", "full"]),
    "gradient_accumulation_steps": st.integers(1, 64),
    "report_to": st.sampled_from(["none", "tensorboard", ["tensorboard", "wandb"]]),
    "save_strategy": st.sampled_from(["no", "steps", "epoch"]),
    "save_total_limit": st.one_of(st.none(), st.integers(1, 5)),
    "debug": st.sampled_from(["", ["underflow_overflow"]]),
    "train_sampling_strategy": st.sampled_from(["random", "group_by_length"]),
    "include_num_input_tokens_seen": st.sampled_from([True, False, "all", "non_padding", "no"]),
    "fsdp": st.sampled_from([None, True, "full_shard auto_wrap", ["full_shard"]]),
    "label_names": st.one_of(st.none(), st.lists(st.text(max_size=5), max_size=2)),
    "run_name": st.one_of(st.none(), st.text(max_size=20)),
    "logging_steps": st.one_of(st.integers(1, 99), st.floats(0.01, 0.99)),
    "neftune_noise_alpha": st.one_of(st.none(), st.floats(0, 15)),
    "train_mode": st.sampled_from(["full", "lora", "qlora"]),
    "task_type": st.sampled_from(["sft", "pretrain"]),
    "lora_rank": st.integers(1, 1024),
    "lora_dropout": st.floats(0, 0.99),
    "eval_split": st.floats(0, 0.5),
    "use_unsloth": st.sampled_from([None, True, False]),
    "system": st.one_of(st.none(), st.text(max_size=20)),
    "load_adapter": st.none(),
}


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_effective_round_trips(values: dict[str, Any]) -> None:
    config = config_of(**values)
    effective = json.loads(json.dumps(config.effective()))
    again = config_from_dict(effective).config
    assert again == config
    assert again.effective() == config.effective()
    assert again.training_arguments() == config.training_arguments()
