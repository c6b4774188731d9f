"""`FastLanguageModel.from_pretrained`: every parameter, every kind of checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pyralis import FastLanguageModel, FastModel, PatchDPOTrainer, is_bfloat16_supported
from pyralis.api import loading, notice
from pyralis.errors import ModelError
from pyralis.memory.auto import planner_of
from pyralis.models.dtype import choose_device, choose_dtype
from pyralis.models.hub import HubOptions
from pyralis.models.load import ModelSettings
from pyralis.models.nf4 import four_bit_layers
from pyralis.models.surgery import report
from tests.api.models import IDS, load, logits, with_adapter
from tests.tiny import FAMILIES, make_tiny_model, make_tiny_tokenizer


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "llama")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged in this test."""
    lines: list[str] = []
    monkeypatch.setattr(notice, "_said", set())
    monkeypatch.setattr(notice.logger, "info", lines.append)
    return lines


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_checkpoint_is_quantised_while_loading(tmp_path: Path, family: str) -> None:
    model, tokenizer = load(tmp_path, family)
    assert len(list(four_bit_layers(model))) > 0
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<|pad|>")
    assert report(model).fast_layers == (0 if family in ("gpt2", "bloom") else 2)
    assert not model.training


def test_sixteen_bits(llama: Path) -> None:
    for options in ({"load_in_4bit": False}, {"load_in_16bit": True}):
        model, _ = load(llama, dtype=torch.bfloat16, **options)
        assert not list(four_bit_layers(model))
        assert model.dtype in (torch.bfloat16, torch.float32)  # a CPU without fast bfloat16 takes float32
    model, _ = load(llama, load_in_4bit=False)
    stock = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-4, atol=2e-5)


def test_eight_bits(llama: Path) -> None:
    model, _ = load(llama, load_in_8bit=True)
    assert sum(type(module).__name__ == "Linear8bitLt" for module in model.modules()) == 14
    assert report(model).fast_layers == 0


def test_full_finetuning(llama: Path) -> None:
    model, _ = load(llama, full_finetuning=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    assert planner_of(model) is not None
    assert FastLanguageModel.get_peft_model(model) is model  # as scripts for both modes call it
    half, _ = load(llama, full_finetuning=True, dtype=torch.bfloat16)
    assert half.dtype == choose_dtype("auto", choose_device()).dtype


def test_a_checkpoint_in_4_bits(llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load(llama)
    model.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    again, _ = load(tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))
    assert report(again).fast_layers == 2
    as_it_is, _ = load(tmp_path / "packed", load_in_4bit=False)
    assert torch.equal(logits(as_it_is), logits(model))
    with pytest.raises(ModelError, match="only adapters can be trained"):
        load(tmp_path / "packed", full_finetuning=True)


@pytest.mark.parametrize("bits", [None, 4])
def test_an_adapter_comes_with_its_base_and_is_trained_further(llama: Path, tmp_path: Path, bits: int | None) -> None:
    model = with_adapter(llama, bits=bits)
    model.save_pretrained(tmp_path / "adapter")
    again, tokenizer = load(tmp_path / "adapter", load_in_4bit=bits == 4)
    assert isinstance(again, PeftModel)
    torch.testing.assert_close(logits(again), logits(model))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert tokenizer.chat_template == make_tiny_tokenizer().chat_template
    assert report(again).fast_layers == 2
    assert FastLanguageModel.get_peft_model(again, r=4) is again
    with pytest.raises(ModelError, match="asks for rank 8"):
        FastLanguageModel.get_peft_model(again, r=8)


def test_an_adapter_keeps_the_rope_that_it_was_trained_with(llama: Path, tmp_path: Path, said: list[str]) -> None:
    model, _ = load(llama, max_seq_length=1024)
    FastLanguageModel.get_peft_model(model, r=4).save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter", max_seq_length=2048)
    assert again.config.rope_parameters["factor"] == 2.0
    assert any("as when the adapter was trained" in line for line in said)
    unscaled, _ = load(llama)
    FastLanguageModel.get_peft_model(unscaled, r=4).save_pretrained(tmp_path / "other")
    again, _ = load(tmp_path / "other", max_seq_length=2048)
    assert "factor" not in again.config.rope_parameters
    (tmp_path / "other" / "pyralis_adapter.json").unlink()  # as another program saves it: what is asked for holds
    again, _ = load(tmp_path / "other", max_seq_length=2048)
    assert again.config.rope_parameters["factor"] == 4.0


def test_an_adapter_on_the_hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_adapter(llama).save_pretrained(tmp_path / "adapter")
    there = {"adapter_config.json"}
    monkeypatch.setattr(loading, "hub_is_cut_off", lambda: False)
    monkeypatch.setattr(loading, "file_exists", lambda name, file, **_: file in there)
    monkeypatch.setattr(loading, "snapshot_download", lambda *_, **__: str(tmp_path / "adapter"))
    model, _ = FastLanguageModel.from_pretrained("someone/adapter", None, "float32")
    assert isinstance(model, PeftModel)

    def offline(*_: Any, **__: Any) -> bool:
        raise OfflineModeIsEnabled("offline")

    find = loading._local_adapter
    assert find("someone/adapter", None, HubOptions(local_files_only=True)) == "someone/adapter"
    there.add("config.json")
    assert find("someone/model", None, HubOptions()) == "someone/model"
    monkeypatch.setattr(loading, "file_exists", offline)
    assert find("someone/model", None, HubOptions()) == "someone/model"
    monkeypatch.setattr(loading, "hub_is_cut_off", lambda: True)
    monkeypatch.setattr(loading, "file_exists", lambda *_, **__: pytest.fail("asked without a connection"))
    assert find("someone/model", None, HubOptions()) == "someone/model"


def test_a_gguf_file_is_loaded_dequantised(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of `load_model`; that reads a real file in the tests of the demo model."""
    make_tiny_model(tmp_path)
    (tmp_path / "tiny.gguf").touch()
    asked: list[ModelSettings] = []
    plain = loading.load_model(ModelSettings(str(tmp_path), dtype="float32"))
    monkeypatch.setattr(loading, "load_model", lambda settings, **_: asked.append(settings) or plain)
    monkeypatch.setattr(loading, "load_tokenizer", lambda *_, **__: make_tiny_tokenizer())
    FastLanguageModel.from_pretrained(str(tmp_path / "tiny.gguf"))
    assert asked[0].train_mode == "lora"
    assert any("no effect on a GGUF file" in line for line in said)


def test_rope_is_scaled_for_longer_sequences(llama: Path, said: list[str]) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(llama))  # 2048 by default, the model has 512
    assert model.config.rope_parameters["factor"] == 4.0
    assert any(line.startswith("RoPE is scaled (linear x 4)") for line in said)
    assert tokenizer.model_max_length >= 2048
    model, _ = load(llama, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert model.config.rope_parameters["rope_type"] == "dynamic"


def test_the_vocabulary_is_resized(llama: Path) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    model, _ = load(llama, resize_model_vocab=400)
    twin, _ = load(llama, resize_model_vocab=400)
    assert model(IDS).logits.shape[-1] == 400
    assert torch.equal(model.get_input_embeddings().weight, twin.get_input_embeddings().weight)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_has_no_effect_is_named_once(llama: Path, said: list[str]) -> None:
    for _ in range(2):
        load(
            llama, use_exact_model_name=True, max_lora_rank=8, fix_tokenizer=False,
            gpu_memory_utilization=0.5, fast_inference=True, device_map="auto", token="x", random_state=1,
        )  # fmt: skip
    named = [line.split(" ")[0] for line in said if "has no effect" in line]
    expected = ["fix_tokenizer", "use_exact_model_name", "max_lora_rank"]
    assert named == [*expected, "gpu_memory_utilization", "fast_inference"]


def test_what_is_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match="trust_remote_code=True is refused: code that comes"):
        load(llama, trust_remote_code=True)
    with pytest.raises(ModelError, match="no parameter 'max_seq_len'; did you mean 'max_seq_length'"):
        load(llama, max_seq_len=5)
    with pytest.raises(ModelError, match="expected True, False"):
        load(llama, use_gradient_checkpointing="often")
    with pytest.raises(ModelError, match="dtype is 'half'"):
        load(llama, dtype="half")
    with pytest.raises(ModelError, match=r'device_map is .*expected "sequential"'):
        load(llama, device_map="everywhere")
    with pytest.raises(ModelError, match="There is no folder"):
        FastLanguageModel.from_pretrained("./nowhere")


@pytest.mark.parametrize("place", ["cpu", torch.device("cpu"), {"": "cpu"}])
def test_places(llama: Path, place: Any) -> None:
    model, _ = load(llama, device_map=place, torch_dtype="float32", dtype=None)
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)


def test_other_names() -> None:
    assert FastModel is FastLanguageModel
    PatchDPOTrainer()
    assert is_bfloat16_supported() is (torch.cuda.is_available() and torch.cuda.is_bf16_supported(False))


def test_lines_reach_a_terminal_without_logging_set_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = logging.Logger("pyralis")  # one that no other test has touched
    monkeypatch.setattr(notice, "logger", fresh)
    monkeypatch.setattr(notice, "_said", set())
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for _ in range(2):
        notice.notice("once")
    assert capsys.readouterr().err == "Pyralis: once\n"
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    silent = logging.Logger("pyralis")
    monkeypatch.setattr(notice, "logger", silent)
    notice.notice("by the script's own handlers")
    assert silent.handlers == []


def test_an_embedding_that_has_to_stay_is_said(llama: Path, said: list[str]) -> None:
    model, _ = load(llama, offload_embedding=True)
    FastLanguageModel.get_peft_model(model, r=4, modules_to_save=["embed_tokens"])
    assert any(line.startswith("offload_embedding: the embedding is a") for line in said)
    model, _ = load(llama, offload_embedding=True)
    before = len(said)
    FastLanguageModel.get_peft_model(model, r=4)  # without a GPU nothing moves
    assert not any("host memory" in line for line in said[before:])
