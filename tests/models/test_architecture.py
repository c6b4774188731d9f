from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyralis.errors import ConfigError
from pyralis.models.architecture import resolve_architecture

# The models that Firefly's configs name: those that transformers has, and the file of code that the others need.
NATIVE = {
    "01-ai/Yi-1.5-6B-Chat": "llama",
    "01-ai/Yi-34B": "llama",
    "01-ai/Yi-6B": "llama",
    "01-ai/Yi-6B-Chat": "llama",
    "HuggingFaceH4/zephyr-7b-beta": "mistral",
    "IDEA-CCNL/Ziya2-13B-Chat": "llama",
    "NousResearch/Llama-2-13b-chat-hf": "llama",
    "NousResearch/Llama-2-7b-chat-hf": "llama",
    "NousResearch/Meta-Llama-3-8B-Instruct": "llama",
    "Qwen/Qwen1.5-7B-Chat": "qwen2",
    "Qwen/Qwen1.5-MoE-A2.7B-Chat": "qwen2_moe",
    "Qwen/Qwen2-7B-Instruct": "qwen2",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2",
    "bigscience/bloom-1b1": "bloom",
    "bigscience/bloom-3b": "bloom",
    "bigscience/bloom-7b1": "bloom",
    "deepseek-ai/deepseek-llm-7b-chat": "llama",
    "google/gemma-2b-it": "gemma",
    "google/gemma-7b-it": "gemma",
    "lmsys/vicuna-13b-v1.5": "llama",
    "lmsys/vicuna-7b-v1.5": "llama",
    "microsoft/Phi-3-mini-128k-instruct": "phi3",
    "mistralai/Mistral-7B-Instruct-v0.1": "mistral",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral",
    "openbmb/MiniCPM3-4B": "minicpm3",
}
REMOTE = {
    "OrionStarAI/Orion-14B-Chat": "modeling_orion.py",
    "Qwen/Qwen-14B-Chat": "modeling_qwen.py",
    "Qwen/Qwen-7B": "modeling_qwen.py",
    "Qwen/Qwen-7B-Chat": "modeling_qwen.py",
    "THUDM/chatglm2-6b": "modeling_chatglm.py",
    "THUDM/chatglm3-6b": "modeling_chatglm.py",
    "baichuan-inc/Baichuan-13B-Chat": "modeling_baichuan.py",
    "baichuan-inc/Baichuan2-13B-Chat": "modeling_baichuan.py",
    "baichuan-inc/Baichuan2-7B-Chat": "modeling_baichuan.py",
    "baichuan-inc/baichuan-7B": "modeling_baichuan.py",
    "deepseek-ai/deepseek-moe-16b-chat": "modeling_deepseek.py",
    "internlm/internlm-chat-20b": "modeling_internlm.py",
    "internlm/internlm-chat-7b": "modeling_internlm.py",
    "internlm/internlm2-chat-20b": "modeling_internlm2.py",
    "internlm/internlm2-chat-7b": "modeling_internlm2.py",
    "openbmb/MiniCPM-2B-dpo-fp16": "modeling_minicpm.py",
    "xverse/XVERSE-13B-Chat": "modeling_xverse.py",
    "xverse/XVERSE-7B-Chat": "modeling_xverse.py",
}


def write_config(folder: Path, **config: object) -> str:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def test_the_list_is_all_of_firefly() -> None:
    assert len(NATIVE) + len(REMOTE) == 43


@pytest.mark.parametrize(("name", "model_type"), NATIVE.items())
def test_native_by_name(name: str, model_type: str) -> None:
    found = resolve_architecture(name)
    assert (found.name, found.source, found.native, found.remote_code) == (model_type, "table", True, None)


@pytest.mark.parametrize(("name", "code"), REMOTE.items())
def test_remote_by_name(name: str, code: str) -> None:
    with pytest.raises(ConfigError, match=code) as caught:
        resolve_architecture(name)
    assert "trust_remote_code" in str(caught.value)
    found = resolve_architecture(name, trust_remote_code=True)
    assert found.remote_code == f"{name}: {code}"
    assert not found.native


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("meta-llama/Llama-3.2-1B", "llama"),
        ("/models/Qwen3-8B/", "qwen3"),
        ("Qwen/Qwen3-30B-A3B", "qwen3_moe"),
        ("google/gemma-2-9b-it", "gemma2"),
        ("google/gemma-2b", "gemma"),
        ("google/gemma-3-1b-it", "gemma3_text"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "qwen2"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "llama"),
        ("microsoft/phi-4", "phi3"),
    ],
)
def test_other_well_known_names(name: str, model_type: str) -> None:
    assert resolve_architecture(name).name == model_type


@pytest.mark.parametrize(
    "name", ["me/my-model", "Qwen/Qwen2.5-VL-7B-Instruct", "openbmb/MiniCPM-V-2_6", "microsoft/Phi-3-vision"]
)
def test_unknown_names_are_accepted(name: str) -> None:
    found = resolve_architecture(name)
    assert (found.name, found.source, found.native) == ("unknown", "unknown", False)


def test_a_local_config_counts_before_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen-7B"
    folder.mkdir()
    found = resolve_architecture(write_config(folder, model_type="llama", auto_map={"AutoModelForCausalLM": "m.M"}))
    assert (found.name, found.source, found.native, found.remote_code) == ("llama", "local", True, None)


def test_local_remote_code(tmp_path: Path) -> None:
    auto_map = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModelForCausalLM": "someone/repo--modeling_x.XForCausalLM",
    }
    name = write_config(tmp_path, model_type="x_private", auto_map=auto_map)
    with pytest.raises(ConfigError, match=r"modeling_x\.py"):
        resolve_architecture(name)
    assert resolve_architecture(name, trust_remote_code=True).remote_code == f"{name}: modeling_x.py"


def test_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve_architecture(str(tmp_path))
    with pytest.raises(ConfigError, match="A newer transformers"):
        resolve_architecture(write_config(tmp_path, model_type="x_private"), trust_remote_code=True)
    with pytest.raises(ConfigError, match="not as a causal language model"):
        resolve_architecture(write_config(tmp_path, model_type="vit"))
    with pytest.raises(ConfigError, match="no model_type"):
        resolve_architecture(write_config(tmp_path, hidden_size=8))
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid JSON"):
        resolve_architecture(str(tmp_path))


def test_adapter_and_gguf_folders_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match="GGUF"):
        resolve_architecture(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="load_adapter"):
        resolve_architecture(str(tmp_path))
