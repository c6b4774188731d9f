"""The performance pages show what the result files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pyralis.bench.chinese import PHRASES, in_chinese
from pyralis.bench.page import PAGES, RESULTS, ROOT, renewed
from pyralis.bench.train.results import Record

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)


@every_page
def test_the_page_is_what_the_results_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert renewed(text, PAGES[page]) == text, "run `python -m pyralis.bench.page`"


@every_page
def test_every_table_has_its_results(page: Path) -> None:
    files = re.findall(r"<!-- table: (\S+) -->", page.read_text(encoding="utf-8"))
    assert files
    assert all((RESULTS / name).is_file() for name in files)


@every_page
def test_every_result_has_its_table(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    # A kernel's launches; docs/data.md; docs/troubleshooting.md; docs/step-graphs.md, docs/trainers.md
    apart = {
        "nf4-tiles-h100.json", "tokenise-1m-2-cores.json", "deterministic-h100.json", "step-checks-h100.json"
    }  # fmt: skip
    assert {path.name for path in RESULTS.glob("*.json") if f"<!-- table: {path.name} -->" not in text} == apart


@every_page
def test_every_table_is_generated(page: Path) -> None:
    text = re.sub(r"<!-- table: .*?<!-- end -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readmes_figures_are_the_results(name: str) -> None:
    readme = (ROOT / name).read_text(encoding="utf-8")
    paragraph = next(part for part in readme.split("\n\n") if "Unsloth 2026" in part)
    figures = {int(figure.replace(",", "")) for figure in re.findall(r"(?<![.\d])\d[\d,]*(?![.\d])", paragraph)}
    record, faster = (Record.read(RESULTS / f"train-llama3-8b-qlora-h100{which}.json") for which in ("", "-faster-cpu"))
    variants = {"keep", "keep+graph", "keep+resident+graph", "False"}
    small = [run for run in record.runs if run.case.shape.batch < 8 and run.case.variant in variants]
    steps = {round(run.seconds * 1e3) for run in small}
    steps |= {round(run.seconds * 1e3) for run in faster.runs if run.case.peer == "unsloth"}
    ragged = json.loads((RESULTS / "ragged-llama3-8b-h100.json").read_text(encoding="utf-8"))["results"]
    assert len(steps) == 10
    assert steps | {round(max(one["learnt_per_s"] for one in ragged), -2)} <= figures
    assert record.versions["unsloth"] in paragraph


def test_the_chinese_page_has_the_same_tables_and_figures() -> None:
    """Only words are translated: numbers, and all that is not a word, stand where they stood."""
    english, chinese = (page.read_text(encoding="utf-8") for page in PAGES)
    tables = [re.findall(r"<!-- table: (\S+) -->(.*?)<!-- end -->", page, re.DOTALL) for page in (english, chinese)]
    assert [name for name, _ in tables[0]] == [name for name, _ in tables[1]]
    for (_, one), (_, other) in zip(*tables, strict=True):
        assert re.findall(r"\d+(?:\.\d+)*", one) == re.findall(r"\d+(?:\.\d+)*", other)
        assert in_chinese(one) == other


def test_every_phrase_is_used() -> None:
    english = next(iter(PAGES)).read_text(encoding="utf-8")
    translated = english
    for phrase, chinese in PHRASES:
        translated, times = re.subn(phrase, chinese, translated, flags=re.MULTILINE)
        assert times, f"nothing on the page reads {phrase!r}"


def test_the_price_of_determinism_is_the_result() -> None:
    found = json.loads((RESULTS / "deterministic-h100.json").read_text(encoding="utf-8"))
    usual, fixed = (
        sum(found[f"ms a step, {name}"] for name in names) / 2
        for names in (("unwatched", "unwatched again"), ("deterministic", "deterministic again"))
    )
    assert found["equal, deterministic"] == {"weights": True, "losses": True}
    for page in ("docs/troubleshooting.md", "docs/zh/troubleshooting.md"):
        assert f"{fixed / usual - 1:.0%}".replace("%", " %") in (ROOT / page).read_text(encoding="utf-8")


def test_the_trainers_share_of_a_step_is_the_result() -> None:
    (times,) = json.loads((RESULTS / "step-checks-h100.json").read_text(encoding="utf-8"))["times"]
    for page in ("docs/trainers.md", "docs/zh/trainers.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert all(f"{times[name]:.2f}" in text for name in ("trainer_graph", "bare_graph"))
