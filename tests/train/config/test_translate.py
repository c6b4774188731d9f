from __future__ import annotations

from typing import Any

import pytest

from pyralis.errors import ConfigError
from pyralis.train.config.old_names import OLD_NAMES, OLD_VALUES
from pyralis.train.config.train_config import LoadedConfig, TrainConfig, config_from_dict

MINIMAL: dict[str, Any] = {"model_name_or_path": "me/some-model", "train_file": "rows.jsonl", "max_seq_length": 64}


def load(**values: Any) -> LoadedConfig:
    return config_from_dict({**MINIMAL, **values})


@pytest.mark.parametrize(
    ("old", "value", "new", "meaning"),
    [
        ("warmup_ratio", 0.03, "warmup_steps", 0.03),
        ("warmup_ratio", "0.03", "warmup_steps", 0.03),
        ("per_gpu_train_batch_size", 3, "per_device_train_batch_size", 3),
        ("no_cuda", True, "use_cpu", True),
        ("group_by_length", True, "train_sampling_strategy", "group_by_length"),
        ("group_by_length", False, "train_sampling_strategy", "random"),
        ("adafactor", True, "optim", "adafactor"),
        ("include_inputs_for_metrics", True, "include_for_metrics", ["inputs"]),
        ("push_to_hub_token", "t", "hub_token", "t"),
        ("activation_checkpointing", True, "gradient_checkpointing", "auto"),
        ("torch_dtype", "bfloat16", "dtype", "bfloat16"),
        ("dataset_num_proc", 3, "tokenize_num_workers", 3),
        ("assistant_only_loss", False, "loss_on", "everything"),
        ("r", 8, "lora_rank", 8),
        ("target_modules", ["q_proj"], "lora_target_modules", ["q_proj"]),
        ("lora_target", "all", "lora_target_modules", "all-linear"),
        ("lora_target", "q_proj, v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("load_in_4bit", True, "train_mode", "qlora"),
        ("load_in_4bit", False, "train_mode", "lora"),
        ("use_gradient_checkpointing", "unsloth", "gradient_checkpointing", "auto"),
        ("random_state", 7, "seed", 7),
        ("stage", "pt", "task_type", "pretrain"),
        ("finetuning_type", "lora", "train_mode", "lora"),
        ("quantization_bit", 4, "train_mode", "qlora"),
        ("double_quantization", False, "double_quant", False),
        ("enable_liger_kernel", True, "use_liger_kernel", True),
        ("template", "qwen", "template_name", "qwen"),
        ("flash_attn", "fa2", "attn_implementation", "flash_attention_2"),
        ("val_size", 0.1, "eval_split", 0.1),
    ],
)
def test_old_names_keep_their_meaning(old: str, value: Any, new: str, meaning: Any) -> None:
    loaded = load(**{old: value})
    assert getattr(loaded.config, new) == meaning
    assert any(note.startswith(f"{old}: ") and f"read as {new}: " in note for note in loaded.notes)


def test_names_of_required_fields() -> None:
    config = config_from_dict({"model_name": "me/m", "dataset": "a.jsonl", "cutoff_len": 32}).config
    assert (config.model_name_or_path, config.train_file, config.max_seq_length) == ("me/m", "a.jsonl", 32)


@pytest.mark.parametrize("old", [name for name, old in OLD_NAMES.items() if old.why == old.unused])
def test_dropped_names_change_nothing(old: str) -> None:
    loaded = load(**{old: "anything"})
    assert loaded.config == load().config
    assert any(note.startswith(f"{old}: has no effect: ") for note in loaded.notes)


@pytest.mark.parametrize(
    ("old", "value", "instead"),
    [
        ("sharded_ddp", "simple", "deepspeed"),
        ("tokenizer", "other", "model_name_or_path"),
        ("load_in_8bit", True, "qlora"),
        ("quantization_bit", 8, "train_mode: qlora"),
        ("finetuning_type", "freeze", "train_mode"),
        ("quantization_method", "hqq", "bitsandbytes"),
        ("val_size", 100, "eval_split"),
        ("warmup_ratio", 1.5, "below 1"),
        ("warmup_ratio", True, "below 1"),
    ],
)
def test_what_cannot_be_kept_is_refused(old: str, value: Any, instead: str) -> None:
    with pytest.raises(ConfigError, match=instead) as caught:
        load(**{old: value})
    assert str(caught.value).startswith(f"{old}: ")


def test_harmless_values_of_refused_names_pass() -> None:
    assert load(sharded_ddp="", load_in_8bit=False).config == load().config


def test_a_removed_value_is_replaced() -> None:
    loaded = load(optim="adamw_hf")
    assert loaded.config.optim == "adamw_torch"
    assert any("adamw_hf" in note for note in loaded.notes)


def test_old_and_new_must_agree() -> None:
    assert load(evaluation_strategy="steps", eval_strategy="steps", eval_split=0.1).config.eval_strategy == "steps"
    with pytest.raises(ConfigError, match=r'evaluation_strategy: "steps" means .* but eval_strategy says "epoch"'):
        load(evaluation_strategy="steps", eval_strategy="epoch", eval_split=0.1)
    with pytest.raises(ConfigError, match="r: 8 means lora_rank: 8, but lora_r says 4"):
        load(lora_r=4, r=8)


def test_warmup_steps_count_before_a_ratio_as_they_always_did() -> None:
    loaded = load(warmup_ratio=0.1, warmup_steps=20)
    assert loaded.config.warmup_steps == 20
    assert any(note.startswith("warmup_ratio: has no effect") for note in loaded.notes)
    assert load(warmup_ratio=0.1, warmup_steps=0).config.warmup_steps == 0.1


def test_llama_factory_qlora_in_two_words() -> None:
    assert load(finetuning_type="lora", quantization_bit=4, quantization_method="bnb").config.train_mode == "qlora"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, (8, 16, 0.0)),
        ({"lora_rank": 32}, (32, 64, 0.0)),
        ({"lora_rank": 32, "lora_alpha": 16, "lora_dropout": 0.1}, (32, 16, 0.1)),
    ],
)
def test_lora_of_llama_factory_is_the_same_lora(given: dict[str, Any], meant: tuple[float, ...]) -> None:
    config = load(finetuning_type="lora", **given).config
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == meant
    assert load(finetuning_type="full").config.lora_alpha == load().config.lora_alpha


def test_resume_from_checkpoint_null_says_nothing() -> None:
    assert load(resume_from_checkpoint=None).config.resume_from_checkpoint == "auto"


def test_the_table_leads_to_fields() -> None:
    for name, old in OLD_NAMES.items():
        assert name not in TrainConfig.model_fields, f"{name} is a field of this transformers"
        assert set(old.new) <= set(TrainConfig.model_fields), name
    assert {key for key, _ in OLD_VALUES} <= set(TrainConfig.model_fields)


def test_an_old_name_for_what_equals_nothing() -> None:
    with pytest.raises(ConfigError, match="eval_strategy: NaN is not allowed"):
        load(evaluation_strategy=float("nan"))
