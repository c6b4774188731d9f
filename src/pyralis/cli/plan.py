"""`pyralis plan CONFIG`: what a run would take on a GPU that need not be here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from pyralis.train.plan_run import PlannedRun


def register(app: typer.Typer) -> None:
    @app.command()
    def plan(
        config: Annotated[str, typer.Argument(help="A JSON or YAML config.")],
        overrides: Annotated[
            list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override fields of the config.")
        ] = None,
        gpu: Annotated[
            str | None,
            typer.Option(help="rtx4090, t4, v100, a100, h100 ..., or a size: 24GB.", show_default="the one here"),
        ] = None,
        batch: Annotated[
            int | None, typer.Option(min=1, help="Rows of a micro-batch.", show_default="as configured")
        ] = None,
        length: Annotated[
            int | None, typer.Option(min=2, help="Tokens of a row.", show_default="the longest row")
        ] = None,
        json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    ) -> None:
        """Predict memory by category, the plan, speed and the largest batch that fits. Nothing is loaded."""
        import sys

        from rich.console import Console

        from pyralis.cli.quiet import quiet_libraries

        quiet_libraries()
        from pyralis.train.config.train_config import load_config
        from pyralis.train.plan_run import plan_run

        loaded = load_config(config, overrides or [])
        with Console(stderr=True).status("planning", spinner="line"):
            planned = plan_run(loaded.config, gpu, batch=batch, length=length)
        console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        for part in show(planned):
            console.print(part)
        if json_file is not None:
            _write(planned, json_file)
        if not planned.plan.fits:
            raise typer.Exit(1)


def show(planned: PlannedRun) -> list[RenderableType]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from pyralis.memory.explain import gib, layer_lines, memory_rows, second_rows

    made, rates = planned.plan, planned.rates
    total = sum(size for _, size in memory_rows(made))
    headline = Text.assemble(
        (f"{planned.config.model_name_or_path}", "bold"),
        f", {planned.config.train_mode}, {planned.rows} x {planned.length:,} tokens on {rates.name}: ",
        (f"{gib(total)} of {gib(rates.memory_bytes)}", "bold green" if made.fits else "bold red"),
    )

    def table(title: str, unit: str, rows: Iterable[tuple[str, str]], total: str) -> Table:
        filled = Table(title=title, box=box.SIMPLE, title_justify="left")
        filled.add_column("what", overflow="fold")
        filled.add_column(unit, justify="right")
        for row in rows:
            filled.add_row(*row)
        filled.add_row("all", total, style="bold")
        return filled

    sizes = ((name, f"{size / 2**30:.2f}") for name, size in memory_rows(made))
    memory = table("Memory at the peak", "GiB", sizes, f"{total / 2**30:.2f}")
    times = ((name, f"{seconds * 1e3:.1f}") for name, seconds in second_rows(made))
    time = table("Time of a micro-batch", "ms", times, f"{made.seconds.total * 1e3:.1f}")
    lines = [f"- {line}" for line in layer_lines(made)]
    if not made.fits:
        lines.append("- it does not fit, even so: a smaller batch, a shorter max_seq_length, qlora or a smaller rank")
    plan = Text("\n".join(["Plan", *lines, ""]))
    return [headline, memory, time, plan, Text("\n".join(facts(planned)))]


def facts(planned: PlannedRun) -> list[str]:
    from pyralis.memory.explain import gib

    found = []
    if planned.plan.fits:
        found += speed(planned)
    found.append(f"largest batch: {planned.largest_batch:,} rows of {planned.length:,} tokens")
    found.append(f"longest context: {planned.longest:,} tokens in one row")
    if planned.plan.memory.host:
        found.append(f"host memory for inputs of layers: {gib(planned.plan.memory.host)}")
    return [*found, *(f"note: {note}" for note in planned.notes)]


def speed(planned: PlannedRun) -> list[str]:
    found = [f"{planned.tokens_per_second:,.0f} tokens/s"]
    if planned.data is not None and planned.hours is not None:
        about = "" if planned.data.exact else "about "
        epochs = f"{float(planned.config.num_train_epochs):g} epoch(s)"
        found.append(f"{about}{planned.data.tokens:,} tokens of data, {epochs}: {about}{duration(planned.hours)}")
    else:
        found.append("the data is not here: how long it takes is not known")
    return found


def duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours >= 1 / 60 else f"{hours * 3600:.0f} seconds"


def _write(planned: PlannedRun, path: Path) -> None:
    import dataclasses
    import json

    from pyralis.models.staging import write_text

    fields = ("rates", "plan", "rows", "length", "largest_batch", "longest", "seconds", "data", "notes")
    kept = dataclasses.make_dataclass("Planned", fields)(*(getattr(planned, name) for name in fields))
    values = dataclasses.asdict(kept)
    more = {"tokens_per_second": planned.tokens_per_second, "hours": planned.hours}
    write_text(path, json.dumps({"model": planned.config.model_name_or_path, **values, **more}, indent=1) + "\n")
