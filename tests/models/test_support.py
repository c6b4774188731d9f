"""docs/models.json says what runs; the pages, English and Chinese, say what docs/models.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models.support import ALL, CHINESE, FACTS, FEATURES, PAGES, cells, page_with, render, run

FOUND: dict[str, dict[str, str]] = json.loads(FACTS.read_text(encoding="utf-8"))
WRITE = "python -m tests.models.support"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_the_page_says_what_was_found(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert page == page_with(render(FOUND, PAGES[path]), page), f"run {WRITE}"


def test_chinese_has_words_for_what_is_in_the_table() -> None:
    assert set(CHINESE) <= {"fast", "stock", *FEATURES}
    facts = {name: {"LoRA": "a reason"} for name in ALL}
    assert "| LoRA | 原版 (1) |" in render(facts, CHINESE)
    assert render(facts, CHINESE).endswith("\n\n(1) a reason")


def test_every_cell_was_run() -> None:
    assert [(name, title) for name in ALL for title in FOUND[name]] == cells(), f"run {WRITE}"


def params() -> list[Any]:
    """A cell of each column in the quick tier, of another family in each, and all in the fuller one."""
    titles, quick = list(FEATURES), set()
    for place, title in enumerate(titles):
        having = [name for name, other in cells() if other == title]
        quick.add((having[place % len(having)], title))
    return [pytest.param(*cell, marks=() if cell in quick else pytest.mark.full) for cell in cells()]


@pytest.mark.parametrize(("name", "title"), params())
def test_it_is_still_so(name: str, title: str) -> None:
    assert run(name, title) == FOUND[name][title], f"run {WRITE}"
