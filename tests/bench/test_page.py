"""The performance page shows what the result files say."""

from __future__ import annotations

import re

from pyralis.bench.page import PAGE, RESULTS, renewed


def test_the_page_is_what_the_results_say() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert renewed(page) == page, "run `python -m pyralis.bench.page`"


def test_every_table_has_its_results() -> None:
    files = re.findall(r"<!-- table: (\S+) -->", PAGE.read_text(encoding="utf-8"))
    assert files
    assert all((RESULTS / name).is_file() for name in files)
