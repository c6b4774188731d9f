"""docs/performance.md's tables, written from the JSON that the benchmarks left, so that no figure is copied by hand.

`python -m pyralis.bench.page` renews the page and the Chinese one; a test holds both to the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from pyralis.bench.chinese import in_chinese
from pyralis.bench.page_tables import table_of

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"
PAGES: dict[Path, Callable[[str], str]] = {  # and what becomes of a table there
    ROOT / "docs" / "performance.md": str,
    ROOT / "docs" / "zh" / "performance.md": in_chinese,
}
_BLOCK = re.compile(r"(<!-- table: (?P<file>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def renewed(page: str, translated: Callable[[str], str] = str) -> str:
    """The page with each table made anew from the file that its marker names."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{translated(table_of(RESULTS / match['file']))}\n\n{match[3]}"

    return _BLOCK.sub(fill, page)


def main() -> None:
    for page, translated in PAGES.items():
        page.write_text(renewed(page.read_text(encoding="utf-8"), translated), encoding="utf-8")


if __name__ == "__main__":
    main()
