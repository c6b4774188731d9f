"""A model's folder from anyone: refused in words; none of its code or pickles is run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pyralis.errors import ModelError, PyralisError
from pyralis.lora.adapter import load_adapter
from pyralis.models.hub import HubOptions
from pyralis.models.load import ModelSettings, load_model, load_tokenizer
from tests.tiny import build_tiny_model, make_tiny_model


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": "4"}, {"hidden_size": -1}, {"rope_parameters": 7}, {"vocab_size": None},
        {"num_hidden_layers": 0.5}, {"quantization_config": [1]},
        {"model_type": "evil", "auto_map": {"AutoConfig": []}}, {"model_type": 7},
    ],
    ids=str,
)  # fmt: skip
def test_odd_configs(values: dict[str, Any], tmp_path: Path) -> None:
    change(make_tiny_model(tmp_path) / "config.json", **values)
    with pytest.raises(ModelError, match=re.escape(str(tmp_path))):
        load_model(ModelSettings(str(tmp_path)))


@pytest.mark.parametrize(
    "content", ["{}", '{"model": 7}', "[" * 50_000, '{"version": "1.0", "model": {"type": "BPE"}}']
)
def test_odd_tokenizers(content: str, tmp_path: Path) -> None:
    (make_tiny_model(tmp_path) / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "m.gguf"
    for content in (b"", b"GGUF", b"GGUF" + b"\x03\0\0\0" + b"\xff" * 16 + b"\0" * 40):
        file.write_bytes(content)
        for load in (lambda: load_tokenizer(str(file)), lambda: load_model(ModelSettings(str(file)))):
            with pytest.raises(ModelError, match=r"cannot be (loaded|used|read)"):
                load()


@pytest.mark.parametrize(
    "values", [{"rank_pattern": 0.5}, {"target_modules": 7}, {"layers_pattern": {"a": 1}}], ids=str
)
def test_odd_adapters(values: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(build_tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    change(tmp_path / "adapter_config.json", **values)
    with pytest.raises(ModelError, match="does not fit the base model"):
        load_adapter(build_tiny_model(), tmp_path)


@pytest.mark.parametrize("name", [7, ["a"], "", "a" * 5000, "zero\0byte"])
def test_a_base_that_is_no_name(name: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": name}))
    with pytest.raises(PyralisError):
        load_model(ModelSettings(str(tmp_path), hub=HubOptions(local_files_only=True)))


@pytest.mark.parametrize("scaling", [{"rope_type": ["yarn"]}, {"rope_type": "yarn", "factor": "2"}, {"type": {"a": 1}}])
def test_odd_scalings_of_a_record(scaling: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="rope_scaling is"):
        load_model(ModelSettings(str(make_tiny_model(tmp_path)), rope_scaling=scaling))


def _code(folder: Path, proof: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Evil: pass\n")
    for name, kind in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        change(folder / name, auto_map={kind: "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, model_type="evil")


def _pickle(folder: Path, proof: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(f"cbuiltins\nopen\n(S'{proof}'\nS'w'\ntR.".encode())


@pytest.mark.parametrize("put", [_code, _pickle])
def test_nothing_of_it_runs(put: Callable[[Path, Path], None], tmp_path: Path) -> None:
    folder, proof = make_tiny_model(tmp_path / "model"), tmp_path / "it ran"
    put(folder, proof)
    with pytest.raises(PyralisError):
        load_model(ModelSettings(str(folder)))
    with suppress(ModelError):
        load_tokenizer(str(folder))
    assert not proof.exists()
