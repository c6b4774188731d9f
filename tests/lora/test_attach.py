"""LoRA sits on every linear layer but the head, trains in float32, and refuses what would be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.lora.config import KasaConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pyralis.errors import ModelError
from pyralis.lora.attach import LoraSettings, attach_lora, count_parameters, find_linear_targets
from pyralis.models.load import ModelSettings, load_model
from tests.tiny import FAMILIES, build_tiny_model, make_tiny_model

IDS = torch.arange(4, 52).reshape(2, 24)
SPLIT = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
TARGETS = {
    "phi3": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "bloom": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
}


def adapted(model: nn.Module) -> set[str]:
    return {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_mode", ["lora", "qlora"])
def test_targets_of_every_family(tmp_path: Path, family: str, train_mode: str) -> None:
    folder = make_tiny_model(tmp_path, family)
    model = load_model(ModelSettings(str(folder), train_mode, dtype="float32")).model  # type: ignore[arg-type]
    assert find_linear_targets(model) == TARGETS.get(family, SPLIT)
    linear = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and n != "lm_head"}
    tuned = attach_lora(model, LoraSettings(rank=4))
    assert adapted(tuned) == {f"base_model.model.{name}" for name in linear}
    assert all("lora_" in name for name, p in tuned.named_parameters() if p.requires_grad)

    loss = tuned(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


def test_a_name_that_the_head_shares_is_written_in_full() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
            self.inner = nn.ModuleDict({"score": nn.Linear(2, 2), "up": nn.Linear(2, 2)})

    assert find_linear_targets(Odd()) == ["block.0", "block.2", "up"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings", [LoraSettings(rank=4), LoraSettings(rank=4, bias="all", modules_to_save=("lm_head",))]
)
def test_what_is_trained_is_float32(dtype: torch.dtype, settings: LoraSettings) -> None:
    model = build_tiny_model("qwen2").to(dtype)
    tuned = attach_lora(model, settings)
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for n, p in tuned.named_parameters() if n.endswith("q_proj.base_layer.weight")} == {dtype}


@pytest.mark.parametrize("train_mode", ["lora", "qlora"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_are_the_same(tmp_path: Path, train_mode: str, reentrant: bool) -> None:
    folder = make_tiny_model(tmp_path)

    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        loaded = load_model(ModelSettings(str(folder), train_mode, dtype="float32"))  # type: ignore[arg-type]
        tuned = attach_lora(loaded.model, LoraSettings(rank=4, dropout=0.0)).train()
        if checkpointed:
            tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
            tuned.enable_input_require_grads()
        tuned(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LoraSettings(target_modules=("q_proj", "c_attn")), "names 'c_attn', which LlamaForCausalLM does not have"),
        (LoraSettings(target_modules=("proj",)), "its linear layers: down_proj, gate_proj"),
        (LoraSettings(target_modules=("input_layernorm",)), "LoRA cannot be put on this model"),
        (LoraSettings(modules_to_save=("wte",)), "modules_to_save names 'wte'"),
        (LoraSettings(init_lora_weights="pissa"), "expected one of true, false, gaussian, orthogonal"),
    ],
)
def test_refused(settings: LoraSettings, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        attach_lora(build_tiny_model(), settings)


def test_a_packed_layer_cannot_be_trained_whole(tmp_path: Path) -> None:
    model = load_model(ModelSettings(str(make_tiny_model(tmp_path)), "qlora", dtype="float32")).model
    with pytest.raises(ModelError, match="is in 4 bits and cannot be trained whole"):
        attach_lora(model, LoraSettings(modules_to_save=("gate_proj",)))


def test_an_orthogonal_start_on_packed_layers(tmp_path: Path) -> None:
    """Which PEFT casts to the weights' integer dtype."""
    model = load_model(ModelSettings(str(make_tiny_model(tmp_path)), "qlora", dtype="float32")).model
    before = model(IDS).logits
    tuned = attach_lora(model, LoraSettings(rank=4, init_lora_weights="orthogonal"))
    assert tuned.peft_config["default"].init_lora_weights is True  # PEFT would fail at it again when it loads
    for layer in (module for module in tuned.modules() if hasattr(module, "lora_A")):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert A.dtype == B.dtype == torch.float32
        assert A.norm() > 0.1
        assert B.norm() > 0.1
        torch.testing.assert_close(B @ A, torch.zeros(B.shape[0], A.shape[1]), rtol=0, atol=1e-6)
    torch.testing.assert_close(tuned(IDS).logits, before, rtol=1e-4, atol=1e-5)
    model = load_model(ModelSettings(str(tmp_path), "qlora", dtype="float32")).model
    with pytest.raises(ModelError, match=r"the rank of .*q_proj is 3: take an even one"):
        attach_lora(model, LoraSettings(rank=3, init_lora_weights="orthogonal"))


def test_a_variant_that_peft_would_pass_over(tmp_path: Path) -> None:
    model = load_model(ModelSettings(str(make_tiny_model(tmp_path)), "qlora", dtype="float32")).model
    with pytest.raises(ModelError, match="kasa_config would have no effect"):
        attach_lora(model, LoraSettings(rank=4, more={"kasa_config": KasaConfig()}))


def test_loftq_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyralis.lora.attach.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs the package scipy: pip install scipy"):
        attach_lora(build_tiny_model(), LoraSettings(init_lora_weights="loftq", may_change_base=True))


class TestContinuing:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> tuple[Path, torch.Tensor]:
        tuned = attach_lora(build_tiny_model(), LoraSettings(rank=4, modules_to_save=("lm_head",)))
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            logits = tuned.eval()(IDS).logits
        tuned.save_pretrained(tmp_path)
        return tmp_path, logits

    def test_goes_on_where_it_was(self, saved: tuple[Path, torch.Tensor]) -> None:
        folder, logits = saved
        tuned = attach_lora(build_tiny_model(), LoraSettings(rank=64), adapter=folder)
        assert torch.equal(tuned.eval()(IDS).logits, logits)
        trainable = [name for name, p in tuned.named_parameters() if p.requires_grad]
        assert len(trainable) == 2 * 14 + 1

    def check(self, model: PreTrainedModel, folder: Path, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            attach_lora(model, LoraSettings(), adapter=folder)

    def test_on_another_model(self, saved: tuple[Path, torch.Tensor]) -> None:
        self.check(build_tiny_model(hidden_size=128), saved[0], "does not fit the base model.*size mismatch")
        self.check(build_tiny_model(num_hidden_layers=1), saved[0], "the model has no place for .*layers.1")
        self.check(build_tiny_model(num_hidden_layers=3), saved[0], "it lacks .*layers.2")
        self.check(build_tiny_model("gpt2"), saved[0], "does not fit the base model")

    def test_without_safe_weights(self, saved: tuple[Path, torch.Tensor]) -> None:
        (saved[0] / "adapter_model.safetensors").rename(saved[0] / "adapter_model.bin")
        self.check(build_tiny_model(), saved[0], "has no adapter_model.safetensors")

    def test_with_damaged_weights(self, saved: tuple[Path, torch.Tensor]) -> None:
        file = saved[0] / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
        self.check(build_tiny_model(), saved[0], "is damaged")

    def test_what_is_no_lora(self, saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
        (saved[0] / "adapter_config.json").write_text('{"peft_type": "IA3"}')
        self.check(build_tiny_model(), saved[0], "of type IA3; only LORA")
        self.check(build_tiny_model(), tmp_path / "nothing", r"has no adapter_config\.json")


class TestCounting:
    def test_tied_weights_count_once(self) -> None:
        tied, untied = build_tiny_model("llama", tie_word_embeddings=True), build_tiny_model("llama")
        embedding = untied.get_input_embeddings().weight.numel()
        assert count_parameters(untied).total - count_parameters(tied).total == embedding

    def test_packed_weights_count_as_what_they_stand_for(self, tmp_path: Path) -> None:
        folder = make_tiny_model(tmp_path)
        plain = load_model(ModelSettings(str(folder), dtype="float32")).model
        packed = load_model(ModelSettings(str(folder), "qlora", dtype="float32")).model
        assert count_parameters(packed).total == count_parameters(plain).total

    def test_trainable(self) -> None:
        count = count_parameters(attach_lora(build_tiny_model(), LoraSettings(rank=4, target_modules=("q_proj",))))
        assert count.trainable == 2 * 4 * (64 + 64)
        assert count.share == count.trainable / count.total
