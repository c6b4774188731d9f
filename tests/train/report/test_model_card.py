from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyralis.train.report.metric_rows import Metric
from pyralis.train.report.model_card import model_card
from pyralis.train.report.panel import StartupInfo
from pyralis.train.report.summary import summarise
from tests.train.runs import run


def front(card: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return values


def test_an_adapter_of_a_hub_model(startup: StartupInfo, history: list[Metric]) -> None:
    info = dataclasses.replace(startup, model="Qwen/Qwen2.5-7B-Instruct", mode="QLoRA (rank 16)")
    card = model_card(info, summarise(history))
    assert front(card) == {
        "base_model": "Qwen/Qwen2.5-7B-Instruct", "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["pyralis", "sft", "lora"],
    }  # fmt: skip
    for part in ("A LoRA adapter of Qwen/Qwen2.5-7B-Instruct", "| method | QLoRA (rank 16), bfloat16 |",
                 "2.7945 at first, 0.5175 at last", "AutoPeftModelForCausalLM"):  # fmt: skip
        assert part in card
    assert "None" not in card


@pytest.mark.parametrize("path", ["/home/someone/secret/base", "./base", "models/of/base", "~/base"])
def test_a_model_of_this_machine_is_named_without_its_path(path: str, startup: StartupInfo) -> None:
    card = model_card(dataclasses.replace(startup, model=path, mode="full"), summarise([]))
    assert front(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pyralis", "sft"],
    }
    assert path not in card
    assert "A model trained from base, by" in card
    assert "Peft" not in card


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_result_has_it_and_its_code_runs(mode: str, tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    run(tiny_llama, chats, tmp_path / "out", max_steps=2, train_mode=mode)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "More Information Needed" not in card
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code[0].replace("FOLDER", str(tmp_path / "out")), names)
    assert names["model"].num_parameters() > 0
    assert names["tokenizer"].chat_template
