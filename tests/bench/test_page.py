"""The performance pages show what the result files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyralis.bench.chinese import PHRASES, in_chinese
from pyralis.bench.page import PAGES, RESULTS, renewed

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
