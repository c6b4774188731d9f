"""Fine-tune a 4-bit model with a LoRA adapter, by the calls that Unsloth's users know.

python examples/sft_demo.py                                        # Llama-3-8B from the hub, on a GPU
python examples/sft_demo.py unsloth/mistral-7b-bnb-4bit --steps 20
python examples/sft_demo.py "$(pyralis fetch smollm2-135m-instruct)" --steps 3    # a CPU will do
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import TrainingArguments

from pyralis import FastLanguageModel, SFTTrainer, is_bfloat16_supported

DATA = Path(__file__).parents[1] / "data" / "sample_sft.jsonl"


def as_text(row: dict[str, Any]) -> dict[str, str]:
    return {"text": "\n".join(f"<human>: {turn['human']}\n<bot>: {turn['assistant']}" for turn in row["conversation"])}


def main() -> Any:
    parser = argparse.ArgumentParser(description="SFT with FastLanguageModel and SFTTrainer")
    parser.add_argument("model", nargs="?", default="unsloth/llama-3-8b-bnb-4bit")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", default="outputs")
    options = parser.parse_args()

    max_seq_length = 2048  # RoPE is scaled where this is more than the model was made for
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=options.model,
        max_seq_length=max_seq_length,
        dtype=None,  # bfloat16 where the GPU has it, else float16
        load_in_4bit=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",  # the inputs of layers wait in host memory
        random_state=3407,
        max_seq_length=max_seq_length,
        use_rslora=False,
        loftq_config=None,
    )
    trainer = SFTTrainer(
        model=model,
        train_dataset=load_dataset("json", data_files=str(DATA), split="train").map(as_text),
        dataset_text_field="text",
        max_seq_length=max_seq_length,
        tokenizer=tokenizer,
        args=TrainingArguments(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            warmup_steps=10,
            max_steps=options.steps,
            fp16=not is_bfloat16_supported(),
            bf16=is_bfloat16_supported(),
            logging_steps=1,
            output_dir=options.output,
            optim="adamw_8bit",
            seed=3407,
            report_to="none",
        ),
    )
    trainer.train()
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    return trainer


if __name__ == "__main__":
    main()
