"""The schema, explain, the check report, the docs' tables, and the commands."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from pyralis.cli import config as cli_config
from pyralis.errors import ConfigError
from pyralis.train.config.check_report import format_check, json_check
from pyralis.train.config.config_docs import renew
from pyralis.train.config.init import guess_template
from pyralis.train.config.schema import explain, json_schema
from pyralis.train.config.train_config import TrainConfig, config_from_dict, load_config

DOCS = Path(__file__).parents[3] / "docs" / "config.md"
MINIMAL: dict[str, Any] = {"model_name_or_path": "me/some-model", "train_file": "rows.jsonl", "max_seq_length": 64}


def run(*arguments: str) -> Any:
    app = typer.Typer()
    cli_config.register(app)
    return CliRunner().invoke(app, list(arguments))


def test_schema_describes_every_field() -> None:
    schema = json_schema()
    assert schema["required"] == list(MINIMAL)
    assert schema["additionalProperties"] is False
    for name in TrainConfig.model_fields:
        assert schema["properties"][name]["description"], name
    properties = schema["properties"]
    assert properties["train_mode"]["enum"] == ["full", "lora", "qlora"]
    assert (properties["lora_rank"]["minimum"], properties["lora_rank"]["maximum"]) == (1, 1024)
    assert properties["max_samples"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    assert "cosine" in properties["lr_scheduler_type"]["enum"]
    assert properties["warmup_ratio"]["deprecated"] is True


def test_explain() -> None:
    found = explain("lora_rank")
    assert (found.default, found.origin, found.type) == ("64", "Firefly", "a whole number, at least 1 and at most 1024")
    assert "lora_r (PEFT)" in found.old_names
    assert explain("evaluation_strategy").key == "eval_strategy"
    for name in TrainConfig.model_fields:
        assert explain(name).meaning
        assert explain(name).type
    with pytest.raises(ConfigError, match="Did you mean 'lora_rank'"):
        explain("lora_rnk")
    with pytest.raises(ConfigError, match="no field today"):
        explain("logging_dir")


def test_docs_tables_are_what_the_code_says() -> None:
    page = DOCS.read_text(encoding="utf-8")
    assert page == renew(page), "run: python -m pyralis.train.config.config_docs docs/config.md"


def test_check_report_shows_what_shapes_the_run() -> None:
    loaded = config_from_dict({**MINIMAL, "fp16": True, "max_steps": 7, "evaluation_strategy": "no", "tf32": False})
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(format_check(loaded))
    text = console.export_text()
    for words in (
        "me/some-model",
        "unknown offline",
        "float16",
        "7 steps",
        "output/some-model-sft-qlora",
        "tf32",
        "note",
    ):
        assert words in text
    report = json.loads(json_check(loaded))
    assert report["architecture"]["source"] == "unknown"
    assert config_from_dict(report["config"]).config == loaded.config
    assert report["notes"] == list(loaded.notes)


def test_commands_print_schema_and_explanations() -> None:
    assert json.loads(run("config", "schema").stdout)["title"] == "Pyralis config"
    result = run("config", "explain", "lora_r")
    assert result.exit_code == 0
    assert "lora_rank  (lora_r is read as it)" in result.stdout


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@pytest.mark.parametrize(("task", "mode"), [("sft", "qlora"), ("pretrain", "full"), ("dpo", "lora")])
def test_init_writes_a_valid_config(tmp_path: Path, suffix: str, task: str, mode: str) -> None:
    out = tmp_path / f"new.{suffix}"
    arguments = [
        "init",
        "--model",
        "Qwen/Qwen2.5-7B",
        "--task",
        task,
        "--mode",
        mode,
        "--out",
        str(out),
        "--train-file",
        "x",
    ]
    assert run(*arguments).exit_code == 0
    config = load_config(out).config
    assert (config.task_type, config.train_mode, config.train_file) == (task, mode, "x")
    assert config.template_name == ("" if task == "pretrain" else "qwen")
    assert isinstance(run(*arguments).exception, ConfigError)
    assert run(*arguments, "--force").exit_code == 0


def test_init_refuses_what_cannot_be_trained(tmp_path: Path) -> None:
    out = str(tmp_path / "x.yaml")
    assert "--task" in str(run("init", "--model", "m", "--task", "rl", "--out", out).exception)
    assert "modeling_qwen.py" in str(run("init", "--model", "Qwen/Qwen-7B", "--out", out).exception)
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("model", "architecture", "template"),
    [
        ("meta-llama/Llama-3.1-8B", "llama", "llama3"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama", ""),
        ("NousResearch/Llama-2-7b-hf", "llama", "llama2"),
        ("Qwen/Qwen3-8B", "qwen3", ""),
        ("Qwen/Qwen3-8B-Base", "qwen3", "qwen"),
        ("google/gemma-2-9b", "gemma2", "gemma"),
        ("bigscience/bloom-3b", "bloom", "default"),
        ("me/mystery", "unknown", ""),
    ],
)
def test_template_guess(model: str, architecture: str, template: str) -> None:
    assert guess_template(model, architecture) == template


def test_template_guess_asks_a_local_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "qwen-base"
    folder.mkdir()
    assert guess_template(str(folder), "qwen2") == "qwen"
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}', encoding="utf-8")
    assert guess_template(str(folder), "qwen2") == ""
