"""`verify_model` and `pyralis verify`: right models pass, a block made wrong fails and is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from pyralis.cli.verify import register
from pyralis.errors import DataError
from pyralis.lora.attach import LoraSettings, attach_lora
from pyralis.models.fused import FusedBlock
from pyralis.models.load import ModelSettings, load_model
from pyralis.verify import run as verify_run
from pyralis.verify.result import Verification
from pyralis.verify.run import VerifySettings, verify_model
from pyralis.verify.show import show
from tests.models.spec_block import block_in_place
from tests.tiny import make_tiny_model, make_tiny_tokenizer

SMALL: dict[str, Any] = {"dtype": "float32", "tokens": 24}


class WrongLayer(FusedBlock):
    """The second layer's own output has a gradient that is 1 % too large, so those of both layers are wrong."""

    def run(self, handle: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = super().run(handle, hidden_states, *args, **kwargs)
        return 1.01 * out - 0.01 * out.detach() if handle.weights.index == 1 else out


def printed(found: Verification, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(show(found))
    return console.export_text()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gemma2", {"load_in_4bit": True}),
        ("qwen3", {"rows": 3}),
        ("phi3", {"load_in_4bit": True, "rows": 1}),
    ],
)
def test_right_models_pass(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []
    folder = make_tiny_model(tmp_path, family)
    found = verify_model(VerifySettings(str(folder), **SMALL | options), progress=said.append)
    assert found.passed
    assert [comparison.layout for comparison in found.comparisons] == ["right", "left", "packed"]
    assert found.acceleration.fast_layers == 2
    assert len(found.comparisons[0].tensors) == 2 * 2 * (4 if family == "phi3" else 7)
    assert len(said) == 1 + 3 * 3
    text = printed(found)
    assert "PASS" in text
    assert "0-1 fast" in text
    assert ("NF4" if options.get("load_in_4bit") else "plain") + ", computing in float32" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_a_wrong_block_fails_and_its_tensors_are_named(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    with block_in_place(WrongLayer()):
        found = verify_model(VerifySettings(str(folder), **SMALL))
    assert not found.passed
    assert {component.passed for component in found.comparisons[0].components[:2]} == {True}
    assert not any(component.passed for component in found.comparisons[0].components[2:])
    assert found.comparisons[0].failures[0].fast == pytest.approx(0.01, rel=0.05)
    text = printed(found)
    assert "FAIL" in text
    assert "model.layers." in text
    assert "!1.0e-02" in text


def test_nothing_fast_is_nothing_to_compare(tmp_path: Path) -> None:
    found = verify_model(VerifySettings(str(make_tiny_model(tmp_path, "gpt2")), **SMALL))
    assert found.passed
    assert found.comparisons == ()
    text = printed(found)
    assert "0-1 stock: " in text
    assert "PASS: no layer is fast here" in text


def test_an_adapter_and_data_of_the_users(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    model = load_model(ModelSettings(str(base), dtype="float32")).model
    tuned = attach_lora(model, LoraSettings(rank=4, target_modules=("q_proj",), modules_to_save=("lm_head",)))
    tuned.save_pretrained(tmp_path / "adapter")
    make_tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    data = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day to you"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    for model_name, adapter in ((tmp_path / "adapter", None), (base, tmp_path / "adapter")):
        settings = VerifySettings(str(model_name), adapter, str(data), dtype="float32", tokens=80)
        found = verify_model(settings)
        assert found.passed
        assert {t.name.split(".")[-3] for t in found.comparisons[2].tensors} >= {"lora_A", "lora_B", "modules_to_save"}
        assert found.subject.data == str(data)
        assert found.subject.adapter == str(tmp_path / "adapter")
    with pytest.raises(DataError, match="learnt"):
        verify_model(VerifySettings(str(base), data=str(data), tokens=8))


def test_a_truth_that_does_not_fit_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: Any = object()
    errors = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
    failures = iter([*errors, RuntimeError("shapes cannot be multiplied")])

    def measured(model: Any, batch: Any, dtype: torch.dtype) -> Any:
        if dtype == torch.float64:
            raise next(failures)
        return fits

    monkeypatch.setattr(verify_run, "measure_truth", measured)
    for _ in errors:
        assert verify_run._truth(fits, fits, torch.float64) == (fits, torch.float32)
    with pytest.raises(RuntimeError, match="multiplied"):
        verify_run._truth(fits, fits, torch.float64)


def test_the_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    words = ["verify", str(make_tiny_model(tmp_path / "m")), "--tokens", "24", "--dtype", "float32", "--json"]
    right = CliRunner().invoke(app, [*words, str(tmp_path / "right.json")])
    assert right.exit_code == 0, right.output
    assert "PASS" in right.stdout
    with block_in_place(WrongLayer()):
        wrong = CliRunner().invoke(app, [*words, str(tmp_path / "wrong.json")])
    assert wrong.exit_code == 1
    assert "FAIL" in wrong.stdout
    found = json.loads((tmp_path / "wrong.json").read_text())
    assert found["passed"] is False
    assert found["subject"]["dtype"] == "float32"
    assert dict(found["environment"]["packages"])["torch"]
    assert {layer["fast"] for layer in found["layers"]} == {True}
    tensors = found["comparisons"][2]["tensors"]
    assert len(tensors) == 28
    assert not any(tensor["passed"] for tensor in tensors)
