"""`pyralis compare RUN [RUN ...]`: runs beside each other, in the terminal and as one page."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def compare(
        runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Output folders of training runs.")],
        out: Annotated[
            str | None, typer.Option("--out", help="Also write a page with the curves, compare.html.")
        ] = None,
    ) -> None:
        """Compare runs: losses, speed, memory, time, and what their configs differ in."""
        import sys

        from rich.console import Console

        from pyralis.train.report.compare import differences, read_runs
        from pyralis.train.report.compare_page import write_comparison
        from pyralis.train.report.compare_table import comparison_tables
        from pyralis.train.report.language import words

        found = read_runs(runs)
        console = Console(highlight=False)
        if not sys.stdout.isatty():
            console.width = 1000  # a pipe gets whole lines
        for number, table in enumerate(comparison_tables(found, console.width)):
            if number:
                console.print()
            console.print(table)
        if len(found) > 1 and not differences(found):
            console.print(words("These runs have the same config.", "这些训练的配置相同。"))
        if out is not None:
            write_comparison(out, found)
            console.print(words(f"page: {out}", f"页面：{out}"), markup=False, soft_wrap=True)
