"""docs/performance.md's tables, written from the JSON that the benchmarks left, so that no figure is copied by hand.

`python -m pyralis.bench.page` renews the page and the Chinese one; a test holds both to the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyralis.bench.case import PYRALIS
from pyralis.bench.chinese import in_chinese
from pyralis.bench.train.results import KIND, Record
from pyralis.bench.train.tables import markdown_table

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"
PAGES: dict[Path, Callable[[str], str]] = {  # and what becomes of a table there
    ROOT / "docs" / "performance.md": str,
    ROOT / "docs" / "zh" / "performance.md": in_chinese,
}
_BLOCK = re.compile(r"(<!-- table: (?P<file>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(record: dict[str, Any]) -> str:
    """A Markdown table of an ops.json: a row per case, times in microseconds."""
    results = record["results"]
    peers = list(dict.fromkeys(name for r in results for name in r["timings"] if name != PYRALIS))
    rates = record["rates"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"{rates['gpu']}; copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s and matmul "
        f"{rates['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s in the same run; {versions}.",
        "",
        f"| op | model | tokens | Pyralis, us | of the roofline | {' | '.join(peers)} |",
        "|---|---|---|---|---|" + "---|" * len(peers),
    ]
    for r in results:
        ours = r["timings"][PYRALIS]["microseconds"]
        cells = [r["op"], r["shape"], str(r["tokens"]), f"{ours:.1f}", f"{r['roofline_us'] / ours:.0%}"]
        cells += [_time(r["timings"].get(name)) for name in peers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(timing: dict[str, Any] | None) -> str:
    if timing is None:
        return "-"
    return f"{timing['microseconds']:.1f}{'' if timing['graphed'] else ' *'}"


def renewed(page: str, translated: Callable[[str], str] = str) -> str:
    """The page with each table made anew from the file that its marker names."""

    def fill(match: re.Match[str]) -> str:
        path = RESULTS / match["file"]
        record = json.loads(path.read_text(encoding="utf-8"))
        made = markdown_table(Record.read(path)) if record.get("kind") == KIND else table(record)
        return f"{match[1]}\n{translated(made)}\n\n{match[3]}"

    return _BLOCK.sub(fill, page)


def main() -> None:
    for page, translated in PAGES.items():
        page.write_text(renewed(page.read_text(encoding="utf-8"), translated), encoding="utf-8")


if __name__ == "__main__":
    main()
