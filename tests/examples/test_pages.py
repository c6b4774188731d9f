"""The pages for users: what they show runs, and what they say of names, fields and messages is so."""

from __future__ import annotations

import ast
import inspect
import io
import re
import sys
from functools import cache
from pathlib import Path

import pytest

import pyralis
from pyralis import FastLanguageModel
from pyralis.train.config.fields import OwnFields
from pyralis.train.config.old_names import OLD_NAMES
from pyralis.train.config.schema import default_text, explain
from pyralis.train.config.train_config import TrainConfig, config_from_dict
from tests.examples.pages import ROOT, PageRun, blocks
from tests.tiny import make_tiny_model

DOCS = ROOT / "docs"
RUN = ("sft.md", "dpo.md", "coming-from-unsloth.md", "coming-from-firefly.md", "coming-from-llama-factory-and-trl.md",
       "troubleshooting.md")  # fmt: skip
RUN_IN_FULL = ("full-fine-tuning.md", "pretraining.md", "plan.md", "data.md")
CODE = re.compile(r"`([^`]+)`")


def rows(page: str, part: str = "") -> list[list[str]]:
    """The cells of the tables of a page, or of what stands between `<!-- part -->` and `<!-- /part -->`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if part:
        text = text.partition(f"<!-- {part} -->")[2].partition(f"<!-- /{part} -->")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def codes(page: str, part: str, column: int = 0) -> list[str]:
    return [code for row in rows(page, part)[1:] for code in CODE.findall(row[column])]


@pytest.mark.parametrize("name", [*RUN, *(pytest.param(name, marks=pytest.mark.full) for name in RUN_IN_FULL)])
def test_what_a_page_shows_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model(tmp_path / "model", max_position_embeddings=4096)
    (tmp_path / "clone").mkdir()
    PageRun(tmp_path / "clone", model, monkeypatch).page(DOCS / name)


@pytest.mark.full
@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_what_follows_the_quickstart_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of these pages stand behind `make quickstart`; a chat without anybody to talk to ends at once."""
    model = make_tiny_model(tmp_path / "model", max_position_embeddings=4096)
    (tmp_path / "clone").mkdir()
    run = PageRun(tmp_path / "clone", model, monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    run.command("pyralis train train_args/sft/lora/smollm2-135m-sft-lora.json output_dir=output/quickstart")
    run.page(ROOT / name)


@pytest.mark.full
@pytest.mark.parametrize("name", ["sft.md", "dpo.md"])
def test_on_smollm2(name: str, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = PageRun(tmp_path, smollm2, monkeypatch)
    run.page(DOCS / name)
    assert "30 of 30 layers fast" in run.output


def test_names_of_unsloth_lead_somewhere() -> None:
    bound = {
        "save_pretrained",
        "save_pretrained_merged",
        "push_to_hub_merged",
        "save_pretrained_gguf",
        "push_to_hub_gguf",
    }
    for name in codes("coming-from-unsloth.md", "names"):
        owner, _, attribute = name.rpartition(".")
        if owner == "model":
            assert attribute in bound
        else:
            assert hasattr(FastLanguageModel if owner else pyralis, attribute), name
    missing = codes("coming-from-unsloth.md", "missing")
    assert not [name for name in missing if hasattr(pyralis, name)]


def test_every_field_of_firefly_is_told_with_its_default() -> None:
    told = {}
    for row in rows("coming-from-firefly.md", "firefly fields")[1:]:
        told |= dict(zip(CODE.findall(row[0]), row[1].split(", "), strict=True))
    fields = {name for name in OwnFields.model_fields if explain(name).origin == "Firefly"}
    assert set(told) == fields
    for name, default in told.items():
        ours = default_text(TrainConfig.model_fields[name]).strip('"') or "empty"
        assert default == ("false" if name == "use_unsloth" else ours), name


def test_old_names_of_firefly_are_read_as_the_page_says() -> None:
    minimal = {"model_name_or_path": "me/m", "train_file": "a.jsonl", "max_seq_length": 64}
    for old, new, *_ in rows("coming-from-firefly.md", "firefly names")[1:]:
        (given,), today = CODE.findall(old), CODE.findall(new) or CODE.findall(old)
        name, _, value = given.partition(": ")
        wanted, _, meaning = today[0].partition(": ")
        if not value:
            assert OLD_NAMES[name].new == (wanted,)
            continue
        config = config_from_dict(minimal | {name: value}).config
        field, text = (wanted, meaning) if meaning else (name, wanted)
        assert str(getattr(config, field)).lower() == text.lower(), given


def test_every_name_of_llama_factory_is_told() -> None:
    told = {code.partition(":")[0] for code in codes("coming-from-llama-factory-and-trl.md", "factory names")}
    names = {name for name, old in OLD_NAMES.items() if old.origin == "LLaMA-Factory"}
    assert names <= told, names - told
    for row in rows("coming-from-llama-factory-and-trl.md", "factory names")[1:]:
        for code in CODE.findall(row[1]):
            if ":" in code or code.startswith(("train", "task")):
                assert code.partition(":")[0] in TrainConfig.model_fields


@cache
def messages() -> str:
    """Every text in the source, one a line; what is filled in is …"""
    found = [
        (ROOT / "Makefile").read_text(encoding="utf-8").replace("'$(PYTHON)' is $$($(PYTHON) --version 2>&1)", "…")
    ]
    for path in sorted((ROOT / "src/pyralis").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value.replace("%s", "…"))
    return "\n".join(re.sub(r"…+", "…", text) for text in found)


def test_quoted_messages_exist() -> None:
    cells = [row[0] for row in rows("troubleshooting.md") if row[0].startswith("`")]
    quoted = [text for cell in cells for text in re.findall(r"(?<!\\)`((?:\\`|[^`])+)(?<!\\)`", cell)]
    assert len(quoted) > 30
    unmarked = [text.replace(r"\`", "`").strip("… ") for text in quoted]
    assert not [text for text in unmarked if text not in messages()], "nothing in the code says these"


def test_parameters_in_the_pages_scripts_exist() -> None:
    taken = {
        "from_pretrained": set(inspect.signature(FastLanguageModel.from_pretrained).parameters),
        "get_peft_model": set(inspect.signature(FastLanguageModel.get_peft_model).parameters),
    }
    for page in DOCS.rglob("*.md"):
        for language, code in blocks(page):
            if language != "python":
                continue
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in taken:
                    given = {keyword.arg for keyword in node.keywords if keyword.arg}
                    if ast.unparse(node.func.value) == "FastLanguageModel":
                        assert given <= taken[node.func.attr], f"{page.name}: {given - taken[node.func.attr]}"
