"""Well-known model names -> transformers' model type, for checking a config without the hub.

Owners are ignored, since mirrors abound; the first pattern that the last part of the name begins with counts.
"""

from __future__ import annotations

import re

# Model types that live in their checkpoints' own code, and the file that holds the model.
REMOTE_CODE = {
    "baichuan": "modeling_baichuan.py",
    "chatglm": "modeling_chatglm.py",
    "deepseek": "modeling_deepseek.py",
    "internlm": "modeling_internlm.py",
    "internlm2": "modeling_internlm2.py",
    "minicpm": "modeling_minicpm.py",
    "minicpm3": "modeling_minicpm.py",
    "orion": "modeling_orion.py",
    "phi3small": "modeling_phi3_small.py",
    "qwen": "modeling_qwen.py",
    "xverse": "modeling_xverse.py",
}

_PATTERNS: tuple[tuple[str, str], ...] = (
    (r"baichuan2?-(7|13)b", "baichuan"),
    (r"chatglm\d?-6b|glm-4-9b(?!.*-hf)", "chatglm"),
    (r"glm-4-9b.*-hf", "glm"),
    (r"glm-4-(9b|32b)-.*0414", "glm4"),
    (r"internlm2([._]5)?-", "internlm2"),
    (r"internlm3-", "internlm3"),
    (r"internlm-(chat-)?(7|20)b", "internlm"),
    (r"orion-14b", "orion"),
    (r"xverse-(7|13|65)b", "xverse"),
    (r"minicpm3-", "minicpm3"),
    (r"minicpm-[12]b|minicpm4", "minicpm"),
    (r"deepseek-r1-distill-qwen", "qwen2"),
    (r"deepseek-r1-distill-llama", "llama"),
    (r"deepseek-moe-", "deepseek"),
    (r"deepseek-(coder-)?v2", "deepseek_v2"),
    (r"deepseek-(v3|r1$)", "deepseek_v3"),
    (r"deepseek-(llm|math|coder-\d)", "llama"),
    (r"qwen-(1[._]8|7|14|72)b", "qwen"),
    (r"qwen1\.5-moe-|qwen2-57b-a14b", "qwen2_moe"),
    (r"(code)?qwen(1\.5|2|2\.5)-(coder-|math-)?\d|qwq-32b", "qwen2"),
    (r"qwen3-(coder-)?\d+b-a\d", "qwen3_moe"),
    (r"qwen3-\d", "qwen3"),
    (r"llama-4-", "llama4"),
    (r"llama-3\.2-(11|90)b-vision", "mllama"),
    (r"(meta-)?llama-?[23]|llama-(7|13|30|65)b|codellama-|tinyllama|vicuna-|ziya2|ziya-llama|smollm2?-\d", "llama"),
    (r"chinese-(llama|alpaca)-|yi-(1\.5-)?\d+b|yi-coder-", "llama"),
    (r"smollm3-", "smollm3"),
    (r"mixtral-|nous-hermes-2-mixtral", "mixtral"),
    (r"zephyr-7b-gemma", "gemma"),
    (r"mistral-7b|mistral-nemo-|ministral-8b-|zephyr-7b|openhermes-2(\.5)?-mistral|openchat[-_]3\.5", "mistral"),
    (r"gemma-(1\.1-)?[27]b|codegemma-", "gemma"),
    (r"gemma-2-\d", "gemma2"),
    (r"gemma-3-(270m|1b)", "gemma3_text"),
    (r"gemma-3-\d", "gemma3"),
    (r"phi-3-small-", "phi3small"),
    (r"phi-3\.5-moe", "phimoe"),
    (r"phi-3(\.5)?-(mini|medium)-|phi-4$|phi-4-(mini-)?(instruct|reasoning)", "phi3"),
    (r"phi-(1|1_5|2)$", "phi"),
    (r"bloomz?(-|$)", "bloom"),
    (r"falcon-(7|40|180)b", "falcon"),
    (r"pythia-|gpt-neox-", "gpt_neox"),
    (r"(distil)?gpt2(-|$)", "gpt2"),
    (r"opt-\d", "opt"),
    (r"starcoder2-", "starcoder2"),
    (r"stablelm-(2-|zephyr-|3b-4e1t)", "stablelm"),
    (r"c4ai-command-r-", "cohere"),
    (r"olmo-2-", "olmo2"),
    (r"granite-3\.\d-\d+b-(base|instruct)", "granite"),
)


def model_type_of(name: str) -> str | None:
    """The model type of a hub name, or of a folder that is named like one; None where the name says nothing."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    return next((model_type for pattern, model_type in _PATTERNS if re.match(pattern, last)), None)
