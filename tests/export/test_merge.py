"""A merged folder, loaded by stock transformers, gives the logits of base + adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from pyralis.errors import ModelError
from pyralis.export.merge import merge_adapter
from pyralis.lora.attach import LoraSettings, attach_lora
from pyralis.models.load import ModelSettings, TrainMode, load_model
from tests.tiny import FAMILIES, make_tiny_model, make_tiny_tokenizer

IDS = torch.arange(4, 4 + 2 * 24).reshape(2, 24) * 5 % 256 + 4


def make_adapter(base: Path, folder: Path, settings: LoraSettings, train_mode: TrainMode = "lora") -> torch.Tensor:
    """Save an adapter with random weights, as a run would; returns the float32 logits of base + adapter."""
    torch.manual_seed(1)
    loaded = load_model(ModelSettings(str(base), train_mode=train_mode, dtype="float32"))
    tuned = attach_lora(loaded.model, settings).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        logits = tuned(IDS).logits
    tuned.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    run = {"train_mode": train_mode, "quant_type": "nf4", "double_quant": True, "dtype": "auto"}
    (folder / "pyralis_config.json").write_text(json.dumps(run))
    return logits


def stock_logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Eager: transformers before 5.23 would take SDPA for Gemma 2, which leaves the softcap out."""
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        return model.eval()(IDS).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_mode", ["lora", "qlora"])
def test_every_family(tmp_path: Path, family: str, train_mode: TrainMode) -> None:
    base = make_tiny_model(tmp_path / "base", family)
    expected = make_adapter(base, tmp_path / "adapter", LoraSettings(rank=8), train_mode)
    out = merge_adapter(tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(stock_logits(out), expected, atol=1e-4, rtol=0)
    assert (expected - stock_logits(base)).abs().max() > 0.1  # the adapter does something
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]  # nothing half-written is left

    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == json.loads((base / "config.json").read_text())["architectures"]
    assert config["dtype"] == "float32"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == make_tiny_tokenizer().chat_template
    assert json.loads((out / "generation_config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id


VARIANTS = {
    "rslora": LoraSettings(rank=8, use_rslora=True),
    "dora": LoraSettings(rank=8, use_dora=True),
    "bias": LoraSettings(rank=8, bias="all"),
    "some targets": LoraSettings(rank=8, target_modules=("q_proj", "down_proj")),
    "head saved": LoraSettings(rank=8, modules_to_save=("lm_head",)),
    "embedding saved": LoraSettings(rank=8, modules_to_save=("embed_tokens",)),
    "embedding adapted": LoraSettings(rank=8, target_modules=("q_proj", "embed_tokens")),
    "norms saved": LoraSettings(rank=8, modules_to_save=("input_layernorm",)),
}


@pytest.mark.filterwarnings("ignore:.*tied:UserWarning", "ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("family", "tied", "train_mode"), [("qwen2", False, "qlora"), ("llama", True, "lora"), ("llama", True, "qlora")]
)
def test_every_kind_of_adapter(tmp_path: Path, name: str, family: str, tied: bool, train_mode: TrainMode) -> None:
    base = make_tiny_model(tmp_path / "base", family, tie_word_embeddings=tied)
    expected = make_adapter(base, tmp_path / "adapter", VARIANTS[name], train_mode)
    out = merge_adapter(tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(stock_logits(out), expected, atol=1e-4, rtol=0)
    untied = tied and name in ("head saved", "embedding saved", "embedding adapted")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is (tied and not untied)


def test_a_gpt2_bias_is_merged(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", "gpt2")
    expected = make_adapter(base, tmp_path / "adapter", LoraSettings(rank=8, bias="lora_only"), "qlora")
    torch.testing.assert_close(
        stock_logits(merge_adapter(tmp_path / "adapter", tmp_path / "out")), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("train_mode", ["lora", "qlora"])
def test_bfloat16_is_as_near_the_truth_as_base_and_adapter(tmp_path: Path, train_mode: TrainMode) -> None:
    merged_error = unmerged_error = truth_size = folder_error = 0.0
    for seed in range(3):
        folder = tmp_path / str(seed)
        base = make_tiny_model(folder / "base", "llama", seed=seed, dtype=torch.bfloat16)
        truth = make_adapter(base, folder / "adapter", LoraSettings(rank=8), train_mode)
        loaded = load_model(ModelSettings(str(base), train_mode=train_mode), dtype=torch.bfloat16)
        unmerged = PeftModel.from_pretrained(loaded.model, str(folder / "adapter"), autocast_adapter_dtype=False)
        out = merge_adapter(folder / "adapter", folder / "out")
        assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
        with torch.no_grad():
            unmerged_error += float((unmerged.eval()(IDS).logits.float() - truth).square().mean())
        merged_error += float((stock_logits(out, torch.bfloat16) - truth).square().mean())
        folder_error += float((stock_logits(out) - truth).square().mean())
        truth_size += float(truth.square().mean())
    assert merged_error <= unmerged_error
    # The folder computed in float32 is off only by the one rounding of its weights: less than 1 % of the logits.
    assert folder_error < truth_size * 1e-4


def test_base_precision(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    expected = make_adapter(base, tmp_path / "adapter", LoraSettings(rank=8), "qlora")
    out = merge_adapter(tmp_path / "adapter", tmp_path / "out", base_precision="original")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)
        original = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()(IDS).logits
    torch.testing.assert_close(stock_logits(out), original, atol=1e-4, rtol=0)
    assert (original - expected).abs().max() > 0.05


def test_a_checkpoint_that_is_in_4_bits(tmp_path: Path) -> None:
    full = make_tiny_model(tmp_path / "full")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    packed = AutoModelForCausalLM.from_pretrained(full, quantization_config=config, dtype=torch.float32)
    packed.save_pretrained(tmp_path / "base")
    make_tiny_tokenizer().save_pretrained(tmp_path / "base")
    expected = make_adapter(tmp_path / "base", tmp_path / "adapter", LoraSettings(rank=8), "lora")
    out = merge_adapter(tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(stock_logits(out), expected, atol=1e-4, rtol=0)
    with pytest.raises(ModelError, match="holds 4-bit weights only"):
        merge_adapter(tmp_path / "adapter", tmp_path / "other", base_precision="original")


def test_shards_and_dtype(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    expected = make_adapter(base, tmp_path / "adapter", LoraSettings(rank=8))
    out = merge_adapter(tmp_path / "adapter", tmp_path / "out", dtype="bfloat16", max_shard_size="100KB")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(stock_logits(out), expected, atol=0.1, rtol=0)


class TestTheTarget:
    def test_that_is_not_empty_is_refused_before_anything_is_loaded(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(ModelError, match="not empty: choose another folder, or --overwrite"):
            merge_adapter(tmp_path / "adapter", tmp_path / "out")
        with pytest.raises(ModelError, match="holds no model"):
            merge_adapter(tmp_path / "adapter", tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / "notes.txt").read_text() == "mine"

    def test_that_is_a_model_is_replaced_on_demand(self, tmp_path: Path) -> None:
        base = make_tiny_model(tmp_path / "base")
        expected = make_adapter(base, tmp_path / "adapter", LoraSettings(rank=8))
        out = make_tiny_model(tmp_path / "out", "gpt2")
        merge_adapter(tmp_path / "adapter", out, overwrite=True)
        torch.testing.assert_close(stock_logits(out), expected, atol=1e-4, rtol=0)

    def test_survives_a_failure(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base = make_tiny_model(tmp_path / "base")
        make_adapter(base, tmp_path / "adapter", LoraSettings(rank=8))
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        monkeypatch.setattr("pyralis.export.merge._set_generation", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged", overwrite=True)
        assert torch.isfinite(stock_logits(tmp_path / "merged")).all()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "merged"]

    def test_on_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base = make_tiny_model(tmp_path / "base")
        make_adapter(base, tmp_path / "adapter", LoraSettings(rank=8))
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr("pyralis.models.staging.shutil.disk_usage", lambda _: usage)
        with pytest.raises(ModelError, match="MB free, but"):
            merge_adapter(tmp_path / "adapter", tmp_path / "out")


def test_what_is_no_adapter(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    with pytest.raises(ModelError, match="is a whole model, not an adapter"):
        merge_adapter(base, tmp_path / "out")
    with pytest.raises(ModelError, match=r"There is no folder .*nothing; expected an adapter's folder"):
        merge_adapter(tmp_path / "nothing", tmp_path / "out")


def test_a_base_that_moved(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    expected = make_adapter(base, tmp_path / "adapter", LoraSettings(rank=8))
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="--base"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    out = merge_adapter(tmp_path / "adapter", tmp_path / "out", base=str(tmp_path / "moved"))
    torch.testing.assert_close(stock_logits(out), expected, atol=1e-4, rtol=0)


def test_the_template_and_its_stop_token_travel(tmp_path: Path) -> None:
    from pyralis.data.template import load_template, resolve_template, save_template

    base = make_tiny_model(tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", LoraSettings(rank=8))
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "adapter")
    save_template(resolve_template("qwen", tokenizer), tmp_path / "adapter")
    out = merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert load_template(out, AutoTokenizer.from_pretrained(out)).name == "qwen"
    stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert stops == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
