"""The Chinese pages say what the English ones say: the same headings, code, tables and names, and links alike."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
CHINESE = DOCS / "zh"
PAGES = sorted(page.name for page in CHINESE.glob("*.md") if page.name != "README.md")
FOR_DEVELOPERS = {"architecture.md", "fused-layer.md", "ops.md"}  # in English alone

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GENERATED = (  # tables made from the code, which the Chinese pages link to
    re.compile(r"<!-- (fields|old names|templates) -->.*?<!-- /\1 -->", re.DOTALL),
    re.compile(r"<!-- python -m [\w.]+ writes this -->.*?<!-- end -->", re.DOTALL),
)
every_page = pytest.mark.parametrize("name", PAGES)


def read(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    for generated in GENERATED:
        text = generated.sub("", text)
    return text


def both(name: str) -> tuple[str, str]:
    """(English, Chinese)"""
    return read(DOCS / name), read(CHINESE / name)


def prose(text: str) -> str:
    return FENCE.sub("", text)


@every_page
def test_headings_are_the_same(name: str) -> None:
    english, chinese = ([len(mark) for mark in re.findall(r"^(#+) ", prose(text), re.MULTILINE)] for text in both(name))
    assert english == chinese


@every_page
def test_code_is_the_same(name: str) -> None:
    english, chinese = ((FENCE.findall(text), re.findall(r"^    .*", text, re.MULTILINE)) for text in both(name))
    assert english == chinese


@every_page
def test_tables_have_the_same_shape(name: str) -> None:
    english, chinese = (
        [line.replace(r"\|", "").count("|") for line in prose(text).splitlines() if line.startswith("|")]
        for text in both(name)
    )
    assert english == chinese


@every_page
def test_names_in_the_text_are_the_same(name: str) -> None:
    english, chinese = (set(re.findall(r"`([^`\n]+)`", prose(text))) for text in both(name))
    assert english == chinese


@every_page
def test_links_lead_to_the_same_pages(name: str) -> None:
    def targets(text: str) -> Counter[str]:
        paths = (path.partition("#")[0].rpartition("/")[2] for path in re.findall(r"\]\(([^)\s]+)\)", prose(text)))
        return Counter(path for path in paths if path != name)

    english, chinese = map(targets, both(name))
    assert english == chinese


@every_page
def test_what_is_there_in_chinese_is_linked_in_chinese(name: str) -> None:
    english = re.findall(r"\]\(\.\./([\w-]+\.md)\)", prose(read(CHINESE / name)))
    assert not [page for page in english if page in PAGES]


@every_page
def test_punctuation_between_chinese_characters_is_chinese(name: str) -> None:
    assert not re.findall(r"[\u4e00-\u9fff][,;:!?()][\u4e00-\u9fff]", prose(read(CHINESE / name)))


def test_the_index_lists_every_page() -> None:
    index = (CHINESE / "README.md").read_text(encoding="utf-8")
    assert not [name for name in PAGES if f"({name})" not in index]


def test_every_page_for_users_is_there() -> None:
    assert {*PAGES, *FOR_DEVELOPERS, "README.md"} == {page.name for page in DOCS.glob("*.md")}
