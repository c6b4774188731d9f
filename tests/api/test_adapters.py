"""`FastLanguageModel.get_peft_model`: every parameter, a real PeftModel, the same numbers as PEFT by itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM

from pyralis import FastLanguageModel
from pyralis.errors import ModelError
from pyralis.lora.adapter import load_adapter
from pyralis.models.checkpointing import save_policy
from pyralis.models.surgery import decoder_layers, report
from tests.api.models import IDS, change, load, logits
from tests.tiny import build_tiny_model, make_tiny_model

TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "llama")


def attach(folder: Path, bits: int | None = None, **arguments: Any) -> Any:
    model, _ = load(folder, load_in_4bit=bits == 4)
    return FastLanguageModel.get_peft_model(model, **{"r": 4, **arguments})


def adapted(model: Any) -> set[str]:
    """Which modules have LoRA, by the last parts of their names."""
    return {
        name.rpartition(".lora_A.")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name
    }


@pytest.mark.parametrize("bits", [None, 4])
def test_training_is_as_with_peft(llama: Path, bits: int | None) -> None:
    model = attach(llama, bits, lora_alpha=32, use_rslora=True)
    assert type(model).__module__.startswith("peft.")
    assert adapted(model) == TARGETS
    assert report(model).fast_layers == 2
    reference, _ = load(llama, load_in_4bit=bits == 4)
    config = LoraConfig(r=4, lora_alpha=32, use_rslora=True, target_modules=sorted(TARGETS), task_type="CAUSAL_LM")
    stock = get_peft_model(reference, config)
    change(model)
    with torch.no_grad():
        for a, b in zip(stock.parameters(), model.parameters()):
            if a.requires_grad:
                a.copy_(b)
    for tuned in (model, stock):
        tuned.train()(IDS, labels=IDS).loss.backward()
    for (name, a), b in zip(model.named_parameters(), stock.parameters()):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3", "gpt2", "bloom"])
def test_default_targets_are_those_that_a_model_has(tmp_path: Path, family: str) -> None:
    expected = {
        "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
        "gpt2": {"c_attn", "c_proj", "c_fc"},
        "bloom": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    }
    model = FastLanguageModel.get_peft_model(load(tmp_path, family)[0])
    assert adapted(model) == expected.get(family, TARGETS)
    assert model.peft_config["default"].r == 16


def test_targets(llama: Path, tmp_path: Path) -> None:
    assert adapted(attach(llama, target_modules=["q_proj", "v_proj"])) == {"q_proj", "v_proj"}
    assert adapted(attach(llama, target_modules="all-linear")) == TARGETS
    assert adapted(attach(llama, target_modules=r".*\.layers\.1\.mlp\.(up|down)_proj")) == {"up_proj", "down_proj"}
    assert adapted(attach(llama, finetune_mlp_modules=False)) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    fused = FastLanguageModel.get_peft_model(load(tmp_path / "phi", "phi3")[0], target_modules=["k_proj", "up_proj"])
    assert adapted(fused) == {"qkv_proj", "gate_up_proj"}
    for wrong in (["c_attn"], r"nothing\..*"):
        with pytest.raises(ModelError, match="does not have; its linear layers"):
            attach(llama, target_modules=wrong)
    with pytest.raises(ModelError, match="leaves nothing to train"):
        attach(llama, finetune_language_layers=False)


def test_layers(llama: Path) -> None:
    model = attach(llama, layers_to_transform=[1], layers_pattern="layers")
    assert all(".layers.1." in name for name, _ in model.named_parameters() if "lora_" in name)
    assert report(model).fast_layers == 2


@pytest.mark.parametrize("where", ["modules_to_save", "target_modules"])
def test_embedding_and_head_are_trained_whole(llama: Path, where: str) -> None:
    names = ["embed_tokens", "lm_head"]
    given = names if where == "modules_to_save" else [*sorted(TARGETS), *names]
    model = attach(llama, 4, **{where: given})
    assert adapted(model) == TARGETS
    wrapped = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    assert wrapped == set(names)
    trained = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    assert len(trained) == 2
    assert all(p.requires_grad and p.dtype == torch.float32 for p in trained)
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora"])
def test_starts(llama: Path, start: bool | str) -> None:
    model = attach(llama, init_lora_weights=start, loftq_config={})
    expected = logits(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32))
    if start is not False:
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    change(model)
    assert report(model).fast_layers == 2
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("config", [{}, None, {"loftq_bits": 8}, LoftQConfig(loftq_bits=4, loftq_iter=2)])
def test_loftq(llama: Path, config: Any) -> None:
    if importlib.util.find_spec("scipy") is None:
        with pytest.raises(ModelError, match="needs the package scipy"):
            attach(llama, init_lora_weights="loftq", loftq_config=config)
        return
    model = attach(llama, init_lora_weights="loftq", loftq_config=config)
    expected = logits(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32))
    assert 0 < (logits(model) - expected).norm() < 0.3 * expected.norm()
    assert report(model).fast_layers == 2


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_saved_after_such_a_start_fits_the_original_base(
    llama: Path, tmp_path: Path, start: str, rslora: bool
) -> None:
    model = attach(
        llama, init_lora_weights=start, use_rslora=rslora, rank_pattern={"q_proj": 2}, modules_to_save=["lm_head"]
    )
    change(model)
    model.save_pretrained(tmp_path / "adapter")
    stock = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    plain = PeftModel.from_pretrained(stock, str(tmp_path / "adapter"))
    assert plain.peft_config["default"].r == 8
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-3, atol=1e-4)
    again, _ = load(tmp_path / "adapter", load_in_4bit=False)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-3, atol=1e-4)


def test_starts_out_of_quantised_weights_are_refused(llama: Path) -> None:
    for bits in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        model, _ = load(llama, **bits)
        with pytest.raises(ModelError, match="Load the model without quantisation"):
            FastLanguageModel.get_peft_model(model, init_lora_weights="pissa")
    with pytest.raises(ModelError, match="LoRA cannot be put on this model"):
        attach(llama, init_lora_weights="magic")


def test_the_seed_is_the_adapters_alone(llama: Path) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, second = attach(llama), attach(llama)
    other = attach(llama, random_state=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    of = [next(p for n, p in m.named_parameters() if "lora_A" in n) for m in (first, second, other)]
    assert torch.equal(of[0], of[1])
    assert not torch.equal(of[0], of[2])


def test_options_of_peft(llama: Path) -> None:
    model = attach(llama, rank_pattern={"q_proj": 8}, task_type="CAUSAL_LM", use_dora=True, bias="none")
    assert model.peft_config["default"].rank_pattern == {"q_proj": 8}
    assert model.peft_config["default"].use_dora
    with pytest.raises(ModelError, match="no parameter 'lora_aplha'; did you mean 'lora_alpha'"):
        attach(llama, lora_aplha=3)


@pytest.mark.parametrize(
    ("choice", "policy"),
    [("unsloth", "offload_input"), (True, "recompute_layer"), (False, "keep"), ("auto", "keep")],
)
def test_checkpointing(llama: Path, choice: Any, policy: str) -> None:
    model = attach(llama, use_gradient_checkpointing=choice).train()
    assert model.is_gradient_checkpointing is (policy != "keep")
    model.gradient_checkpointing_enable({"use_reentrant": False})  # as a trainer does whose default it is
    assert {save_policy(layer) for layer in decoder_layers(model)} == {policy}
    change(model)
    model(IDS, labels=IDS).loss.backward()
    stock = attach(llama, use_gradient_checkpointing=False).train()
    change(stock)
    stock(IDS, labels=IDS).loss.backward()
    for (name, a), b in zip(model.named_parameters(), stock.parameters()):
        if a.requires_grad:
            assert torch.equal(a.grad, b.grad), name


def test_a_model_that_was_loaded_by_other_means() -> None:
    model = FastLanguageModel.get_peft_model(build_tiny_model(), r=4)
    assert report(model).fast_layers == 2


def test_the_adapter_names_its_base(llama: Path, tmp_path: Path) -> None:
    model = attach(llama)
    model.save_pretrained(tmp_path / "adapter")
    assert model.peft_config["default"].base_model_name_or_path == str(llama)
    stock = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    torch.testing.assert_close(logits(load_adapter(stock, tmp_path / "adapter")), logits(model), rtol=1e-4, atol=2e-5)
