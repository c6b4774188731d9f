"""docs/models.json says what runs, docs/models.md says what docs/models.json says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.models.support import ALL, FACTS, FEATURES, PAGE, cells, page_with, render, run

FOUND: dict[str, dict[str, str]] = json.loads(FACTS.read_text(encoding="utf-8"))
WRITE = "python -m tests.models.support"


def test_the_page_says_what_was_found() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with(render(FOUND), page), f"run {WRITE}"


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
