"""A script as people write it for Unsloth, import line changed, on a real small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments

from pyralis import (
    FastLanguageModel,
    SFTTrainer,
    get_chat_template,
    is_bfloat16_supported,
    standardize_sharegpt,
    train_on_responses_only,
)
from pyralis.models.surgery import report

QUESTIONS = [("What is the capital of France?", "It is Paris."), ("Who are you?", "A small model, 一个小模型。")]


def conversations() -> Dataset:
    turns = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in QUESTIONS]
    return Dataset.from_dict({"conversations": turns})


def test_a_script(smollm2: Path, tmp_path: Path) -> None:
    max_seq_length = 128
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(smollm2), max_seq_length=max_seq_length, dtype=None, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        max_seq_length=max_seq_length,
        use_rslora=False,
        loftq_config=None,
    )
    tokenizer = get_chat_template(tokenizer, chat_template="chatml")
    dataset = standardize_sharegpt(conversations())
    dataset = dataset.map(lambda row: {"text": tokenizer.apply_chat_template(row["conversations"], tokenize=False)})
    trainer = SFTTrainer(
        model=model,
        train_dataset=dataset,
        dataset_text_field="text",
        max_seq_length=max_seq_length,
        tokenizer=tokenizer,
        args=TrainingArguments(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            warmup_steps=0,
            max_steps=2,
            learning_rate=2e-3,
            fp16=torch.cuda.is_available() and not is_bfloat16_supported(),
            bf16=is_bfloat16_supported(),
            logging_steps=1,
            output_dir=str(tmp_path / "outputs"),
            optim="adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
            seed=3407,
            report_to="none",
            save_strategy="no",
        ),
    )
    trainer = train_on_responses_only(trainer, "<|im_start|>user\n", "<|im_start|>assistant\n")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] < losses[0]
    assert report(model).fast_layers == 30

    FastLanguageModel.for_inference(model)
    chat = [{"role": "user", "content": QUESTIONS[0][0]}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    options = {"max_new_tokens": 4, "do_sample": False}
    answer = model.generate(**inputs.to(model.device), **options)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer, save_method="merged_16bit")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).to(model.device)
    ids = inputs["input_ids"].to(model.device)
    with torch.no_grad():
        expected, found = model(ids).logits.float(), merged(ids).logits
    assert (found - expected).norm() < 0.05 * expected.norm()  # bfloat16 weights, and bfloat16 compute where it is fast
    assert answer.shape[1] > ids.shape[1]
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), max_seq_length=max_seq_length)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_the_model_answers(smollm2: Path, load_in_4bit: bool) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(smollm2), None, load_in_4bit=load_in_4bit)
    FastLanguageModel.for_inference(model)
    chats = [[{"role": "user", "content": q}] for q in ("What is the capital of France?", "Say hello.")]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**batch.to(model.device), max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, batch["input_ids"].shape[1] :])
