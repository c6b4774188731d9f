"""What a script gets wrong ends in an error that says so, and costs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from pyralis import FastLanguageModel, SFTConfig, SFTTrainer, merge_adapter
from pyralis.errors import DataError, ModelError
from pyralis.models.surgery import report
from tests.api.models import load, with_adapter
from tests.tiny import make_tiny_model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "llama")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"model_name": None}, "model_name is None"), ({"model_name": "x", "max_seq_length": -1}, "expected at least 1")],
)
def test_loading(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        FastLanguageModel.from_pretrained(**arguments)


@pytest.mark.parametrize("call", [FastLanguageModel.for_training, FastLanguageModel.for_inference])
def test_modes_of_what_is_no_model(call: Any) -> None:
    with pytest.raises(ModelError, match=r"expected a model, such as .* returns, not None"):
        call(None)


@pytest.mark.parametrize(
    "wrong", [{"use_gradient_checkpointing": "often"}, {"bias": "some"}, {"init_lora_weights": "nonsense"}]
)
def test_a_call_that_failed_can_be_made_again(llama: Path, wrong: dict[str, Any]) -> None:
    model, _ = load(llama, load_in_4bit=False)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ModelError, match=next(iter(wrong))):
        FastLanguageModel.get_peft_model(model, r=4, **wrong)
    assert [name for name, _ in model.named_modules()] == names
    assert report(FastLanguageModel.get_peft_model(model, r=4)).fast_layers == 2


def test_the_base_is_not_replaced_by_what_stands_on_it(llama: Path, tmp_path: Path) -> None:
    model = with_adapter(llama, bits=None)
    model.save_pretrained(tmp_path / "adapter")
    before = (llama / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="is the base model itself"):
        model.save_pretrained_merged(llama)
    with pytest.raises(ModelError, match="is the base model itself"):
        merge_adapter(tmp_path / "adapter", llama, overwrite=True)
    assert (llama / "model.safetensors").read_bytes() == before


def test_where_nothing_can_be_written(llama: Path, tmp_path: Path) -> None:
    model = with_adapter(llama, bits=None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="is a file; expected a folder"):
        model.save_pretrained(tmp_path / "file")
    for save in (model.save_pretrained, model.save_pretrained_merged):
        with pytest.raises(ModelError, match=r"cannot be (written to|made): "):
            save(tmp_path / "file" / "below")


def test_an_adapter_is_replaced_whole_or_not_at_all(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapter(llama, bits=None)
    model.save_pretrained(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def full(*arguments: Any, **others: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyralis.api.saving.write_record", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "there is no row in it"), ([{"body": "x"}], "has the columns body; expected one of text, messages")],
)
def test_rows_that_an_sft_trainer_cannot_read(llama: Path, tmp_path: Path, rows: list, message: str) -> None:
    model, tokenizer = load(llama, load_in_4bit=False)
    config = SFTConfig(str(tmp_path / "out"), bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(DataError, match=message):
        SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def test_an_adapter_named_over_another_architecture(llama: Path, tmp_path: Path) -> None:
    with_adapter(llama, bits=None).save_pretrained(tmp_path / "adapter")
    other = make_tiny_model(tmp_path / "other", "qwen2")
    with pytest.raises(ModelError, match="trained on a llama model, and this is a qwen2 model"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=str(other))
