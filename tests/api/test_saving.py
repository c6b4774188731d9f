"""Saving a live model: what lies in the folder computes what the model does."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyralis import FastLanguageModel, merge_adapter
from pyralis.api import saving
from pyralis.errors import ModelError
from pyralis.export.merged_weights import merged_weights
from pyralis.lora.record import TrainingRecord, read_record
from pyralis.models.nf4 import four_bit_layers
from pyralis.models.surgery import report
from tests.api.models import load, logits, with_adapter
from tests.tiny import make_tiny_model, make_tiny_tokenizer


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "llama")


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("bits", [None, 4])
def test_merged_in_16_bits(llama: Path, tmp_path: Path, bits: int | None) -> None:
    model = with_adapter(llama, bits=bits, use_rslora=True, modules_to_save=["lm_head"])
    expected, before = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    model.save_pretrained_merged(tmp_path / "merged", make_tiny_tokenizer(), save_method="merged_16bit")
    merged = stock(tmp_path / "merged", torch.bfloat16)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    exact = {name: tensor for *_, own in merged_weights(model, torch.float32) for name, tensor in own.items()}
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name
    merged.float().load_state_dict(exact)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == make_tiny_tokenizer().chat_template
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_the_merged_model_is_that_of_the_saved_adapter(llama: Path, tmp_path: Path) -> None:
    model = with_adapter(llama)
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "by hand", dtype="bfloat16")
    model.save_pretrained_merged(str(tmp_path / "live"))
    weights = [stock(tmp_path / name).state_dict() for name in ("by hand", "live")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_packed_in_4_bits(llama: Path, tmp_path: Path) -> None:
    model = with_adapter(llama)
    model.save_pretrained_merged(tmp_path / "packed", save_method="merged_4bit_forced")
    packed = stock(tmp_path / "packed")
    assert len(list(four_bit_layers(packed))) == 14
    again, _ = load(tmp_path / "packed")
    assert report(again).fast_layers == 2
    model.save_pretrained_merged(tmp_path / "merged")  # and quantised while it is loaded
    assert torch.equal(logits(again), logits(load(tmp_path / "merged")[0]))


@pytest.mark.parametrize("bits", [None, 4])
def test_adapter(llama: Path, tmp_path: Path, bits: int | None) -> None:
    model = with_adapter(llama, bits=bits)
    model.save_pretrained_merged(tmp_path / "adapter", save_method="lora")
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()
    assert read_record(tmp_path / "adapter") == TrainingRecord(quantized=bits == 4, model_type="llama")
    base, _ = load(llama, load_in_4bit=bits == 4)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter"))), logits(model))


def test_rope_scaling_is_kept(llama: Path, tmp_path: Path) -> None:
    model, _ = load(llama, max_seq_length=1024, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    expected = logits(model)
    model.save_pretrained_merged(tmp_path / "merged")
    merged = stock(tmp_path / "merged")
    assert merged.config.rope_parameters["factor"] == 2.0
    assert merged.config.max_position_embeddings == 1024
    assert (logits(merged) - expected).norm() < 0.02 * expected.norm()
    model.save_pretrained(tmp_path / "adapter")
    assert read_record(tmp_path / "adapter").rope_scaled_to == 1024
    by_hand = stock(merge_adapter(tmp_path / "adapter", tmp_path / "by hand"))
    assert by_hand.config.rope_parameters["factor"] == 2.0
    torch.testing.assert_close(logits(by_hand), expected, rtol=1e-4, atol=2e-5)


def test_a_model_that_is_trained_whole(llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load(llama, full_finetuning=True)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert (logits(stock(tmp_path / "merged")) - logits(model)).norm() < 0.02 * logits(model).norm()
    with pytest.raises(ModelError, match="the model has no adapter"):
        model.save_pretrained_merged(tmp_path / "adapter", tokenizer, save_method="lora")


def test_stops_and_padding_are_where_generate_looks(llama: Path, tmp_path: Path) -> None:
    model = with_adapter(llama)
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    before = model.generation_config.eos_token_id
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    generation = stock(tmp_path / "merged").generation_config
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert generation.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.eos_token_id == before


def test_targets(llama: Path, tmp_path: Path) -> None:
    model = with_adapter(llama)
    model.save_pretrained_merged(tmp_path / "merged")
    model.save_pretrained_merged(tmp_path / "merged", max_shard_size="100KB")  # a model that is there is replaced
    assert not (tmp_path / "merged" / "model.safetensors").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="holds no model: it is not overwritten"):
        model.save_pretrained_merged(tmp_path / "notes")
    model.save_pretrained_merged(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing").exists()


def test_a_failure_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    model = with_adapter(llama)
    model.save_pretrained_merged(tmp_path / "merged")
    expected = logits(stock(tmp_path / "merged"))
    next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] = float("inf")
    with pytest.raises(ModelError, match="not all finite"):
        model.save_pretrained_merged(tmp_path / "merged")
    assert torch.equal(logits(stock(tmp_path / "merged")), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "merged"]


def test_what_is_refused(llama: Path, tmp_path: Path) -> None:
    model = with_adapter(llama)
    for method in (model.save_pretrained_gguf, model.push_to_hub_gguf):
        with pytest.raises(ModelError, match=r"not here yet.*convert_hf_to_gguf.py"):
            method("model", make_tiny_tokenizer(), quantization_method=["q8_0", "q4_k_m"])
    with pytest.raises(ModelError, match=r"merging into them loses precision\. Expected merged_16bit"):
        model.save_pretrained_merged(tmp_path / "out", save_method="merged_4bit")
    with pytest.raises(ModelError, match="what get_peft_model returned"):
        model.get_base_model().save_pretrained_merged(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("save_method", ["merged_16bit", "lora"])
def test_push_to_hub(llama: Path, tmp_path: Path, save_method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str) -> None:
            calls["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            calls["created"] = (repo_id, options)
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, folder_path: Path, **options: Any) -> str:
            calls["files"] = sorted(path.name for path in folder_path.iterdir())
            calls["uploaded"] = options
            return "https://hub/commit"

    monkeypatch.setattr(saving, "HfApi", Api)
    model = with_adapter(llama)
    url = model.push_to_hub_merged("mine", make_tiny_tokenizer(), save_method, token="hf_x", private=True)
    assert url == "https://hub/commit"
    assert (calls["token"], calls["created"]) == ("hf_x", ("mine", {"private": True, "exist_ok": True}))
    assert calls["uploaded"]["repo_id"] == "me/mine"
    weights = "model.safetensors" if save_method == "merged_16bit" else "adapter_model.safetensors"
    assert {weights, "tokenizer.json"} <= set(calls["files"])
    model.save_pretrained_merged("mine", make_tiny_tokenizer(), push_to_hub=True, token="hf_y")
    assert calls["token"] == "hf_y"


def test_copies_save_themselves(llama: Path, tmp_path: Path) -> None:
    model = with_adapter(llama, bits=None)
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            next(p for n, p in twin.named_parameters() if "lora_B" in n).add_(0.5)
        expected = logits(twin)
        assert not torch.allclose(expected, logits(model))
        twin.save_pretrained_merged(tmp_path / str(number))
        assert (logits(stock(tmp_path / str(number))) - expected).norm() < 0.02 * expected.norm()
        assert report(twin).fast_layers == 2


def test_no_class_is_changed(llama: Path) -> None:
    from transformers import LlamaForCausalLM

    with_adapter(llama)
    for cls in (LlamaForCausalLM, PeftModel, torch.nn.Module):
        assert not hasattr(cls, "save_pretrained_merged")


def test_a_chained_call_saves(llama: Path, tmp_path: Path) -> None:
    FastLanguageModel.get_peft_model(load(llama)[0]).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "pyralis_adapter.json").is_file()
