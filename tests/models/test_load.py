"""Loading: dtype, device, what is refused and how it is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from pyralis.errors import ModelError
from pyralis.lora.attach import LoraSettings, attach_lora
from pyralis.models.hub import HubOptions
from pyralis.models.load import ModelSettings, load_model, load_tokenizer
from pyralis.models.nf4 import dequantize_model, dequantize_weight, four_bit_layers
from tests.tiny import FAMILIES, build_tiny_model, make_tiny_model, make_tiny_tokenizer

IDS = torch.arange(4, 52).reshape(2, 24)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llama"))


def test_a_model_is_what_transformers_loads(llama: Path) -> None:
    loaded = load_model(ModelSettings(str(llama), dtype="float32"))
    stock = AutoModelForCausalLM.from_pretrained(llama)
    assert torch.equal(loaded.model(IDS).logits, stock(IDS).logits)
    assert (loaded.dtype, loaded.quantized, loaded.adapter) == (torch.float32, False, None)
    assert not loaded.model.training


def test_full_mode_keeps_float32_master_weights(llama: Path) -> None:
    settings = ModelSettings(str(llama), train_mode="full")
    loaded = load_model(settings, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.dtype == torch.float32
    assert "float32 master weights, bfloat16 compute" in loaded.notes
    compute = ModelSettings(str(llama), train_mode="full", master_weights="compute")
    assert load_model(compute, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="float16 needs float32 master weights"):
        load_model(compute, dtype=torch.float16)


class TestFourBits:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_every_linear_layer_but_the_head(self, tmp_path: Path, family: str, quant_type: str) -> None:
        folder = make_tiny_model(tmp_path, family)
        settings = ModelSettings(str(folder), "qlora", dtype="float32", quant_type=quant_type)  # type: ignore[arg-type]
        loaded = load_model(settings)
        assert loaded.quantized
        packed = dict(four_bit_layers(loaded.model))
        assert len(packed) == (8 if family in ("phi3", "gpt2", "bloom") else 14)
        assert all(layer.quant_type == quant_type for layer in (x.weight for x in packed.values()))
        others = [p for p in loaded.model.parameters() if not hasattr(p, "quant_state")]
        assert {p.dtype for p in others} == {torch.float32}

    def test_nothing_is_upcast(self, llama: Path) -> None:
        loaded = load_model(ModelSettings(str(llama), "qlora"), dtype=torch.bfloat16)
        tuned = attach_lora(loaded.model, LoraSettings(rank=4))
        for name, parameter in tuned.named_parameters():
            if parameter.dtype == torch.float32:
                assert "lora_" in name
            else:
                assert not parameter.requires_grad
        assert loaded.model.get_input_embeddings().weight.dtype == torch.bfloat16

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_a_checkpoint_in_4_bits_takes_the_dtype_asked_for(
        self, llama: Path, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        packed = load_model(ModelSettings(str(llama), "qlora"), dtype=torch.bfloat16).model
        packed.save_pretrained(tmp_path)
        model = load_model(ModelSettings(str(tmp_path)), dtype=dtype).model
        assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}
        for (_, layer), (_, before) in zip(four_bit_layers(model), four_bit_layers(packed)):
            assert (layer.compute_dtype, layer.weight.quant_state.dtype) == (dtype, dtype)
            assert torch.equal(dequantize_weight(layer), dequantize_weight(before))

    def test_dequantised_it_computes_the_same(self, llama: Path) -> None:
        model = load_model(ModelSettings(str(llama), "qlora", dtype="float32")).model
        packed = model(IDS).logits
        dequantize_model(model, torch.float32)
        torch.testing.assert_close(model(IDS).logits, packed, atol=1e-5, rtol=1e-5)
        assert not list(four_bit_layers(model))
        assert "quantization_config" not in model.config.to_dict()

    def test_eval_mode_leaves_the_weights_as_they_are(self, llama: Path) -> None:
        """bitsandbytes repacks them in place on CPUs with AVX512-BF16: training after an evaluation would break."""
        model = load_model(ModelSettings(str(llama), "qlora", dtype="float32")).model
        name, layer = next(four_bit_layers(model))
        before, bits = dequantize_weight(layer), layer.weight.data.clone()
        with torch.inference_mode():
            model.eval()(IDS)
        assert torch.equal(layer.weight.data, bits), name
        assert torch.equal(dequantize_weight(layer), before)

    def test_a_packed_checkpoint_loads_as_it_is(self, llama: Path, tmp_path: Path) -> None:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        AutoModelForCausalLM.from_pretrained(llama, quantization_config=config).save_pretrained(tmp_path)
        for mode in ("lora", "qlora"):
            loaded = load_model(ModelSettings(str(tmp_path), mode, dtype="float32"))  # type: ignore[arg-type]
            assert loaded.quantized
            assert any("quantised already (bitsandbytes)" in note for note in loaded.notes)
        with pytest.raises(ModelError, match="only adapters can be trained"):
            load_model(ModelSettings(str(tmp_path), "full"))


class TestRefused:
    def test_no_folder(self) -> None:
        with pytest.raises(ModelError, match=r"There is no folder \./nowhere"):
            load_model(ModelSettings("./nowhere"))

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"is not a model: .* in it: nothing"):
            load_model(ModelSettings(str(tmp_path)))

    def test_pickled_weights(self, tmp_path: Path) -> None:
        folder = make_tiny_model(tmp_path)
        (folder / "model.safetensors").unlink()
        torch.save(build_tiny_model().state_dict(), folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match=r"pickles \(pytorch_model.bin\).*allow_pickle_weights: true"):
            load_model(ModelSettings(str(folder)))
        loaded = load_model(ModelSettings(str(folder), allow_pickle_weights=True, dtype="float32"))
        assert torch.equal(loaded.model(IDS).logits, build_tiny_model()(IDS).logits)

    def test_a_checkpoint_of_another_model(self, tmp_path: Path) -> None:
        folder = make_tiny_model(tmp_path)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
        with pytest.raises(ModelError, match=r"lacks 9 of the model's weights \(model\.layers\.2"):
            load_model(ModelSettings(str(folder)))

    def test_an_architecture_of_its_own(self, tmp_path: Path) -> None:
        folder = make_tiny_model(tmp_path)
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "nova", "auto_map": {"AutoModelForCausalLM": "modeling_nova.NovaForCausalLM"}}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=r"modeling_nova\.py"):
            load_model(ModelSettings(str(folder)))

    def test_a_name_that_no_hub_can_be_asked_about(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ModelError, match="neither a folder here nor can it be had from the hub"):
            load_model(ModelSettings("nobody/no-such-model"))
        with pytest.raises(ModelError, match="neither a folder here nor can its tokenizer be had from the hub"):
            load_tokenizer("nobody/no-such-model")


class TestTokenizer:
    def test_pads_on_the_right_with_its_own_token(self, llama: Path) -> None:
        tokenizer = load_tokenizer(str(llama))
        assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<|pad|>")

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [({}, "<|pad|>"), ({"eos_token": "<|pad|>"}, "<|endoftext|>"), ({"unk_token": "<|im_start|>"}, "<|pad|>")],
    )
    def test_a_missing_pad_token_is_one_of_the_vocabulary(
        self, tmp_path: Path, settings: dict[str, str], expected: str
    ) -> None:
        tokenizer = make_tiny_tokenizer(pad_token=None)
        for name, value in settings.items():
            setattr(tokenizer, name, value)
        size = len(tokenizer)
        tokenizer.save_pretrained(make_tiny_model(tmp_path))
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    k: v
                    for k, v in json.loads((tmp_path / "tokenizer_config.json").read_text()).items()
                    if k != "pad_token"
                }
            )
        )
        loaded = load_tokenizer(str(tmp_path))
        assert (loaded.pad_token, len(loaded)) == (expected, size)

    def test_a_folder_without_one(self, tmp_path: Path) -> None:
        folder = make_tiny_model(tmp_path)
        (folder / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match="has no tokenizer"):
            load_tokenizer(str(folder))

    def test_a_damaged_one(self, tmp_path: Path) -> None:
        folder = make_tiny_model(tmp_path)
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(ModelError, match="cannot be loaded"):
            load_tokenizer(str(folder))


def test_an_adapter_folder_names_its_base(llama: Path, tmp_path: Path) -> None:
    attach_lora(load_model(ModelSettings(str(llama), dtype="float32")).model, LoraSettings(rank=4)).save_pretrained(
        tmp_path
    )
    loaded = load_model(ModelSettings(str(tmp_path), dtype="float32"))
    assert loaded.adapter == tmp_path
    assert torch.equal(loaded.model(IDS).logits, AutoModelForCausalLM.from_pretrained(llama)(IDS).logits)
    assert load_tokenizer(str(tmp_path)).get_vocab() == make_tiny_tokenizer().get_vocab()  # of the base
    with pytest.raises(ModelError, match="which full training would leave out: merge it first"):
        load_model(ModelSettings(str(tmp_path), "full"))


def test_an_adapter_beside_a_whole_model_is_not_taken_in_silence(llama: Path, tmp_path: Path) -> None:
    attach_lora(load_model(ModelSettings(str(llama), dtype="float32")).model, LoraSettings(rank=4)).save_pretrained(
        tmp_path
    )
    for file in llama.iterdir():
        shutil.copy(file, tmp_path)
    with pytest.raises(ModelError, match=r"whole model and an adapter .*folder of their own"):
        load_model(ModelSettings(str(tmp_path), dtype="float32"))
    (tmp_path / "model.safetensors").unlink()  # only the base's config.json is left
    assert load_model(ModelSettings(str(tmp_path), dtype="float32")).adapter == tmp_path


def test_rope_is_scaled_for_longer_sequences(llama: Path) -> None:
    loaded = load_model(ModelSettings(str(llama), dtype="float32", max_seq_length=2048))
    assert loaded.model.config.rope_parameters["factor"] == 4.0
    assert any(note.startswith("RoPE is scaled (linear x 4)") for note in loaded.notes)
    assert "factor" not in load_model(ModelSettings(str(llama), max_seq_length=512)).model.config.rope_parameters
    given = load_model(ModelSettings(str(llama), max_seq_length=2048, rope_scaling={"type": "dynamic", "factor": 2.0}))
    assert given.model.config.rope_parameters["rope_type"] == "dynamic"


def test_eight_bits(llama: Path) -> None:
    loaded = load_model(ModelSettings(str(llama), "qlora", bits=8, dtype="float32"))
    assert loaded.quantized
    assert sum(type(module).__name__ == "Linear8bitLt" for module in loaded.model.modules()) == 14


def test_the_hub_is_asked_as_said(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    load = AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, **k: asked.append(k) or load(*a, **k))
    load_model(ModelSettings(str(llama), hub=HubOptions(token="hf_x", local_files_only=True)))
    assert (asked[0]["token"], asked[0]["local_files_only"]) == ("hf_x", True)
    assert "cache_dir" not in asked[0]
