"""Stand-ins for libraries that tests do not have: their public calls, over Hugging Face's model."""

from __future__ import annotations

from pathlib import Path

UNSLOTH = """
import sys
late = [name for name in ("torch", "transformers", "peft", "trl") if name in sys.modules]
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import LoraConfig, get_peft_model

class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length=2048, dtype=None, load_in_4bit=True, load_in_8bit=False,
                        full_finetuning=False, use_gradient_checkpointing="unsloth"):
        assert not late, f"unsloth has to be imported before {late}"
        assert isinstance(model_name, str) and use_gradient_checkpointing in ("unsloth", True, False)
        return AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype), AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(model, r=16, target_modules=(), lora_alpha=16, lora_dropout=0.0, bias="none",
                       use_gradient_checkpointing="unsloth", random_state=3407, max_seq_length=2048):
        if use_gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules))
"""

LIGER = """
from transformers import AutoModelForCausalLM as AutoLigerKernelForCausalLM
"""


def write_stubs(folder: Path, unsloth: str = UNSLOTH) -> None:
    """`unsloth` and `liger_kernel.transformers`, importable from `folder`."""
    (folder / "unsloth").mkdir(parents=True)
    (folder / "unsloth" / "__init__.py").write_text(unsloth, encoding="utf-8")
    (folder / "liger_kernel" / "transformers").mkdir(parents=True)
    (folder / "liger_kernel" / "__init__.py").touch()
    (folder / "liger_kernel" / "transformers" / "__init__.py").write_text(LIGER, encoding="utf-8")
