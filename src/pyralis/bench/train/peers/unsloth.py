"""Unsloth, by its public interface. It changes other libraries when it is imported, and so has to come first."""

from __future__ import annotations

from unsloth import FastLanguageModel  # isort: skip

from typing import Any

from torch import nn

from pyralis.bench.train.peers.base import Peer


class Unsloth(Peer):
    """Loaded anew for each variant: what `use_gradient_checkpointing` sets up holds for the process."""

    def prepare(self, variant: str) -> nn.Module:
        self.drop_model()
        bench = self.bench
        longest = max(shape.tokens for shape in bench.shapes)
        checkpointing: Any = {"True": True, "False": False}.get(variant, variant)
        model, self._tokenizer = FastLanguageModel.from_pretrained(
            model_name=str(self.folder),
            max_seq_length=longest,
            dtype=self.dtype,
            load_in_4bit=bench.mode == "qlora",
            full_finetuning=bench.mode == "full",
            use_gradient_checkpointing=checkpointing,
        )
        if bench.mode != "full":
            model = FastLanguageModel.get_peft_model(
                model,
                r=bench.rank,
                lora_alpha=bench.rank,
                lora_dropout=bench.dropout,
                target_modules=list(self.made.targets),
                bias="none",
                use_gradient_checkpointing=checkpointing,
                max_seq_length=longest,
            )
        return model.train()

    def tokenizer(self) -> Any:
        return self._tokenizer

    def trainer(self, variant: str, arguments: dict[str, Any], rows: Any) -> Any:
        return self.sft_trainer(arguments, rows, checkpointed=variant != "False")
