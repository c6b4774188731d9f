"""pyralis.SFTTrainer called as older scripts call TRL's and Unsloth's, and what is said of it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from pyralis.errors import ConfigError
from pyralis.models import dtype
from pyralis.models.dtype import choose_dtype
from pyralis.models.surgery import decoder_layers
from pyralis.train.old_trainer_names import say_once
from pyralis.train.sft_trainer import SFTConfig, SFTTrainer, UnslothTrainer, UnslothTrainingArguments
from tests.tiny import build_tiny_model, make_tiny_tokenizer
from tests.train.sft_runs import DEFAULTS, LORA, TEXTS, assert_alike, build, losses, trained


@pytest.fixture(autouse=True)
def heard_anew() -> None:
    say_once.cache_clear()


def old_arguments(folder: Path, **more: Any) -> TrainingArguments:
    plain = {name: value for name, value in DEFAULTS.items() if name != "max_length"}
    return TrainingArguments(output_dir=str(folder), **plain | more)


def test_the_call_of_an_older_script(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"content": row["text"]} for row in TEXTS]
    with caplog.at_level(logging.WARNING):
        ours = SFTTrainer(
            model=get_peft_model(build_tiny_model(), LORA),
            train_dataset=Dataset.from_list(rows),
            dataset_text_field="content",
            max_seq_length=32,
            dataset_num_proc=1,
            packing=False,
            tokenizer=make_tiny_tokenizer(),
            args=old_arguments(tmp_path, optim="adamw_8bit", fp16=True, seed=3407),
        )
    said = [record.getMessage() for record in caplog.records if record.name.startswith("pyralis")]
    for part in (
        "tokenizer= is called processing_class=", "SFTConfig(dataset_text_field=...)", "SFTConfig(max_length=...)",
        "SFTConfig(dataset_num_proc=...)", "SFTConfig(packing=...)", "fp16 needs a GPU", "adamw_8bit needs a GPU",
    ):  # fmt: skip
        assert sum(part in message for message in said) == 1, (part, said)
    assert max(map(len, ours.train_dataset["input_ids"])) == 32
    assert not ours.args.packing
    ours.train()
    assert len(set(losses(ours))) == 3


def test_plain_arguments_are_those_of_trl(tmp_path: Path) -> None:
    given = {
        "train_dataset": Dataset.from_list(TEXTS), "peft_config": LORA, "processing_class": make_tiny_tokenizer(),
    }  # fmt: skip
    trainers = [
        cls(build_tiny_model(), old_arguments(tmp_path, gradient_accumulation_steps=2), **copy.deepcopy(given))
        for cls in (trl.SFTTrainer, SFTTrainer)
    ]
    for trainer in trainers:
        trainer.train()
    assert_alike(trainers[1], trainers[0])
    assert trainers[1].args.max_length == 1024


def test_bfloat16_on_a_cpu_that_is_fast_in_it_needs_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dtype, "cpu_bfloat16_gain", lambda: 4.0)
    config = SFTConfig(output_dir=str(tmp_path))
    assert config.bf16
    assert config.use_cpu


def test_the_old_name_in_the_config_and_the_names_of_unsloth(tmp_path: Path) -> None:
    assert SFTConfig(output_dir=str(tmp_path), max_seq_length=77, use_cpu=True).max_length == 77
    wanted = choose_dtype("auto", torch.device("cpu")).dtype == torch.bfloat16
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is wanted, "it costs 15 times as much on most CPUs"
    args = UnslothTrainingArguments(str(tmp_path), embedding_learning_rate=5e-5, **DEFAULTS)
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    ours = UnslothTrainer(
        build_tiny_model(), args, train_dataset=Dataset.from_list(TEXTS), tokenizer=make_tiny_tokenizer(),
        peft_config=lora,
    )  # fmt: skip
    rates = {group["lr"]: len(group["params"]) for group in ours.create_optimizer().param_groups if group["params"]}
    assert rates == {1e-2: 4, 5e-5: 2}
    ours.train()


@pytest.mark.parametrize("batched", [False, True])
def test_formatting_functions_of_a_row_and_of_a_batch(batched: bool, tmp_path: Path) -> None:
    rows = [{"question": f"what is {i}?", "answer": f"it is {i}"} for i in range(8)]

    def of_row(row: dict[str, str]) -> str:
        return f"Q: {row['question']} A: {row['answer']}"

    def of_batch(batch: dict[str, list[str]]) -> list[str]:
        return [f"Q: {q} A: {a}" for q, a in zip(batch["question"], batch["answer"])]

    stock = trained(trl.SFTTrainer, tmp_path, rows, formatting_func=of_row)
    ours = trained(SFTTrainer, tmp_path, rows, formatting_func=of_batch if batched else of_row)
    assert_alike(ours, stock)


def test_two_bos_tokens_are_found_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    for text, said in (("<|endoftext|>rendered", True), ("rendered", False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            build(SFTTrainer, tmp_path, [{"text": text}] * 4, processing_class=copy.deepcopy(tokenizer))
        assert any("begin with two" in record.getMessage() for record in caplog.records) is said


def test_activation_offloading_is_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stock = trained(trl.SFTTrainer, tmp_path)
    with caplog.at_level(logging.WARNING):
        ours = trained(SFTTrainer, tmp_path, settings={"activation_offloading": True, "gradient_checkpointing": False})
    assert_alike(ours, stock)
    assert all(layer.gradient_checkpointing for layer in decoder_layers(ours.model))
    assert any("use_gradient_checkpointing='unsloth'" in record.getMessage() for record in caplog.records)


def test_what_no_trainer_ever_took(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no argument 'max_sequence_length'.*'max_seq_length'|max_length"):
        build(SFTTrainer, tmp_path, max_sequence_length=3)
    with pytest.raises(ConfigError, match="tokenizer"):
        build(SFTTrainer, tmp_path, tokenizer=make_tiny_tokenizer())
    with pytest.raises(ConfigError, match="args is a int"):
        SFTTrainer(build_tiny_model(), 3)
