"""The families that the fused block serves. A new one is an entry here and a line in the parity tests.

What an entry says is what cannot be read from the modules; widths, biases, scales, eps and windows are (`detect.py`).
Llama's also serves Code Llama, Vicuna, Yi, DeepSeek-LLM, TinyLlama and SmolLM2, and Mistral's Zephyr: their checkpoints
are of these classes. RoPE scaling (linear, dynamic, llama3, yarn, longrope) is in the angles that the model computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Windows = Literal["none", "config", "layer"]


@dataclass(frozen=True)
class Family:
    """A decoder layer of transformers' `models/{module}/modeling_{module}.py`, classes `{prefix}DecoderLayer` etc.

    Attributes:
        fused: q, k, v come from one projection and gate, up from another (`qkv_proj`, `gate_up_proj`).
        qk_norm: each head of q and k is normed (`q_norm`, `k_norm`).
        four_norms: attention's and the MLP's outputs are normed too.
        unit_offset: norms multiply by 1 + weight.
        windows: "config" where `config.sliding_window` holds for all layers, "layer" where `config.layer_types` says
            in which, "none" where the field is not looked at.
        softcap: attention scores are capped by `attn_logit_softcapping`. Others do not look at the field.
        partial_rotary: `partial_rotary_factor` of each head is rotated.
        residual_multiplier: both branches are multiplied by the layer's `residual_multiplier`.
        dropouts: names of the layer's dropout modules.
        final_softcap: logits are capped by `config.final_logit_softcapping`, where that is a number.
        logits_scaling: logits are divided by `config.logits_scaling`.
        outgrows_float16: its checkpoints' hidden states do (`wide_residual.py`).
    """

    name: str
    module: str
    prefix: str
    fused: bool = False
    qk_norm: bool = False
    four_norms: bool = False
    unit_offset: bool = False
    windows: Windows = "none"
    softcap: bool = False
    partial_rotary: bool = False
    residual_multiplier: bool = False
    dropouts: tuple[str, ...] = ()
    final_softcap: bool = False
    logits_scaling: bool = False
    outgrows_float16: bool = False

    @property
    def source(self) -> str:
        """The Python module that all of the layer's own classes are from."""
        return f"transformers.models.{self.module}.modeling_{self.module}"

    @property
    def activation_name(self) -> str:
        """The MLP's attribute that holds the activation."""
        return "activation_fn" if self.fused else "act_fn"


FAMILIES: tuple[Family, ...] = (
    Family("Llama", "llama", "Llama"),
    Family("Mistral", "mistral", "Mistral", windows="config"),
    Family("Qwen2", "qwen2", "Qwen2", windows="layer", outgrows_float16=True),
    Family("Qwen3", "qwen3", "Qwen3", windows="layer", qk_norm=True, outgrows_float16=True),
    Family("Gemma", "gemma", "Gemma", unit_offset=True, outgrows_float16=True),
    Family(
        "Gemma 2", "gemma2", "Gemma2", unit_offset=True, four_norms=True, windows="layer", softcap=True,
        final_softcap=True, outgrows_float16=True,
    ),
    Family(
        "Gemma 3", "gemma3", "Gemma3", unit_offset=True, four_norms=True, windows="layer", qk_norm=True,
        final_softcap=True, outgrows_float16=True,
    ),
    Family(
        "Phi-3", "phi3", "Phi3", fused=True, windows="config", partial_rotary=True,
        dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
    ),
    Family("Granite", "granite", "Granite", residual_multiplier=True, logits_scaling=True),
)  # fmt: skip

# Why other models' layers are not served, by the first words of their classes' names.
OTHERS: dict[str, str] = {
    "Bloom": "ALiBi in place of RoPE, and an MLP without a gate",
    "Mpt": "ALiBi in place of RoPE, and an MLP without a gate",
    "GPT2": "learnt positions, and an MLP without a gate",
    "OPT": "learnt positions, and an MLP without a gate",
    "GPTNeoX": "attention and MLP side by side, and an MLP without a gate",
    "GPTJ": "attention and MLP side by side, and an MLP without a gate",
    "Falcon": "attention and MLP side by side, and an MLP without a gate",
    "PhiDecoder": "attention and MLP side by side, and an MLP without a gate",
    "Cohere": "attention and MLP side by side, and interleaved RoPE",
    "Olmo2": "norms after attention and MLP only, and over all heads at once",
    "Olmo3": "norms after attention and MLP only, and over all heads at once",
    "Starcoder2": "an MLP without a gate",
    "Nemotron": "an MLP without a gate",
    "DeepseekV2": "latent attention",
    "DeepseekV3": "latent attention",
    "Glm": "interleaved RoPE",
    "Gemma3n": "several residual streams",
}
