"""transformers, PEFT and bitsandbytes with their defaults; the same compiled, with Liger's kernels, and through TRL."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments, default_data_collator

from pyralis.bench.train.clock import Measured
from pyralis.bench.train.peers import KBIT
from pyralis.bench.train.peers.base import Peer
from pyralis.bench.train.settings import Loop, Shape
from pyralis.compat import checkpointing_argument, switch_checkpointing


class HuggingFace(Peer):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kbit = False

    def prepare(self, variant: str) -> nn.Module:
        checkpointed, kbit = variant.startswith("True"), variant.endswith(KBIT)
        if self.model is None or kbit != self.kbit:
            self.drop_model()
            self.kbit = kbit
            model = self.with_adapter(self.pretrained(), checkpointed)
        else:
            model = self.model
        model.config.use_cache = False  # as Trainer and every guide have it: training would fill a cache
        self.checkpoint(model, checkpointed)
        return model.train()

    def pretrained(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, **self.loading())

    def loading(self) -> dict[str, Any]:
        """The arguments of `from_pretrained`."""
        options: dict[str, Any] = {"dtype": self.dtype, "device_map": {"": str(self.device)}}
        if self.bench.mode == "qlora" and not self.made.quantized:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=self.dtype,
            )
        return options | {"attn_implementation": self.made.attention}

    def with_adapter(self, model: Any, checkpointed: bool) -> Any:
        if self.kbit:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointed)
        if self.bench.mode == "full":
            return model
        rank = self.bench.rank
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=rank,
                lora_alpha=rank,
                lora_dropout=self.bench.dropout,
                target_modules=list(self.made.targets),
            ),
        )

    def checkpoint(self, model: Any, checkpointed: bool) -> None:
        switch_checkpointing(model, checkpointed)
        if checkpointed:
            model.enable_input_require_grads()

    def trainer(self, variant: str, arguments: dict[str, Any], rows: Any) -> Any:
        checkpointing: dict[str, Any] = {checkpointing_argument("gradient_checkpointing"): variant.startswith("True")}
        return Trainer(
            model=self.model,
            args=TrainingArguments(**arguments, **checkpointing),
            train_dataset=rows,
            data_collator=default_data_collator,
        )


class Compiled(HuggingFace):
    """`torch.compile` of the model, every shape for itself, as its first use compiles it."""

    def run(self, variant: str, loop: Loop, shape: Shape, warmup: int) -> Measured:
        torch.compiler.reset()
        return super().run(variant, loop, shape, warmup)

    def prepare(self, variant: str) -> nn.Module:
        model: Any = super().prepare(variant)
        model.compile()
        return model


class Liger(HuggingFace):
    def pretrained(self) -> Any:
        from liger_kernel.transformers import AutoLigerKernelForCausalLM

        return AutoLigerKernelForCausalLM.from_pretrained(self.folder, **self.loading())


class Trl(HuggingFace):
    """`trl.SFTTrainer` with its defaults."""

    def trainer(self, variant: str, arguments: dict[str, Any], rows: Any) -> Any:
        return self.sft_trainer(arguments, rows, checkpointed=variant == "True")
