"""The documentation is true to the repository: links, commands, options, make targets, and two READMEs that agree."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from pyralis.cli.main import build_app

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
DOCS = sorted([ENGLISH, CHINESE, ROOT / "data/README.md", *(ROOT / "docs").rglob("*.md")])

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
every_page = pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """The words behind `program` wherever a page shows it: lines of shell blocks, and inline code."""
    text = page.read_text(encoding="utf-8")
    shell = [code for language, code in FENCE.findall(text) if language in ("bash", "sh")]
    lines = [line for code in shell for line in code.replace("\\\n", " ").splitlines()]
    for line in [*lines, *re.findall(r"`([^`\n]+)`", prose(page))]:
        words = re.sub(r"\s#.*", "", line).split()
        if words and words[0] == program:
            yield shlex.split(line, comments=True)[1:]


@cache
def root_command() -> Any:
    return typer.main.get_command(build_app())


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The click command that `words` reach, and what is left for it."""
    command, rest = root_command(), list(words)
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"no command {rest[0]!r} in {sorted(command.commands)}"
        command = command.commands[rest.pop(0)]
    return command, rest


def test_readmes_have_the_same_shape() -> None:
    def headings(page: Path) -> list[int]:
        return [len(mark) for mark in re.findall(r"^(#+) ", prose(page), re.MULTILINE)]

    def links(page: Path) -> set[str]:
        """The Chinese one leads to Chinese pages, where there are any."""
        targets = re.findall(r"\]\(([^)]+)\)", prose(page))
        return {target.replace("docs/zh/", "docs/") for target in targets if not target.startswith("README")}

    def tables(page: Path) -> list[int]:
        return [line.count("|") for line in prose(page).splitlines() if line.startswith("|")]

    assert headings(ENGLISH) == headings(CHINESE)
    assert FENCE.findall(ENGLISH.read_text(encoding="utf-8")) == FENCE.findall(CHINESE.read_text(encoding="utf-8"))
    assert links(ENGLISH) == links(CHINESE)
    assert tables(ENGLISH) == tables(CHINESE)


def test_the_chinese_readme_leads_to_chinese_pages() -> None:
    targets = re.findall(r"\]\(docs/([\w-]+\.md)\)", prose(CHINESE))
    assert not [name for name in targets if (ROOT / "docs/zh" / name).exists()]


@every_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve()
        assert linked.exists(), f"{page.relative_to(ROOT)} links to {target}, which does not exist"
        assert linked.is_relative_to(ROOT), f"{page.relative_to(ROOT)} links to {target}, outside the repository"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", prose(linked), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.relative_to(ROOT)} links to {target}, which has no such heading"


@every_page
def test_pyralis_commands_and_options_exist(page: Path) -> None:
    for words in commands(page, "pyralis"):
        command, rest = resolve(words)
        # `-h` and `--help` are click's own, and not among the parameters.
        known = {"-h", "--help", *(name for parameter in command.params for name in parameter.opts)}
        for option in (word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)):
            assert option in known, f"{page.relative_to(ROOT)}: pyralis {' '.join(words)}: no option {option}"


@every_page
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    for words in commands(page, "make"):
        for word in words:
            name, _, value = word.partition("=")
            if value:
                assert f"$({name})" in makefile, f"{page.relative_to(ROOT)}: make knows no variable {name}"
            else:
                assert word in targets, f"{page.relative_to(ROOT)}: make {word}"


@every_page
def test_files_in_commands_exist(page: Path) -> None:
    for program in ("pyralis", "python", "sed"):
        for word in (word for words in commands(page, program) for word in words):
            if re.match(r"(train_args|data|src)/", word) and "*" not in word:
                assert (ROOT / word).exists(), f"{page.relative_to(ROOT)} names {word}, which does not exist"


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index]
    assert missing == ["README.md"]


@pytest.mark.parametrize("package", ["data", "lora", "train", "export", "serve", "api", "verify"])
def test_the_architecture_page_names_every_file(package: str) -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(rf"\b{package}/([\w/]+\.py)", page))
    folder = ROOT / "src/pyralis" / package
    there = {str(path.relative_to(folder)) for path in folder.rglob("*.py") if path.name != "__init__.py"}
    assert named == there
