"""`pyralis data preview CONFIG` and `pyralis data stats CONFIG`: what a config's data becomes, before anything is
trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

Config = Annotated[str, typer.Argument(help="A JSON or YAML config; its model gives the tokenizer.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override fields of the config.")]


def register(app: typer.Typer) -> None:
    data_app = typer.Typer(help="What the data of a config becomes, before anything is trained.", no_args_is_help=True)
    data_app.command()(preview)
    data_app.command()(stats)
    app.add_typer(data_app, name="data")


def preview(
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="How many rows to show.")] = 3,
    evaluation: Annotated[bool, typer.Option("--eval", help="Show rows of the evaluation data instead.")] = False,
) -> None:
    """Show the first rows as the model sees them, with what is learnt marked and special tokens visible."""
    from pyralis.data.preview import preview as preview_rows
    from pyralis.errors import DataError

    console, _, tokenizer, built = _build(config, overrides or [])
    if evaluation and built.eval is None:
        raise DataError("There is no evaluation data: the config has neither eval_file nor eval_split.")
    console.print(preview_rows(built.eval if evaluation else built.train, tokenizer, rows))


def stats(config: Config, overrides: Overrides = None) -> None:
    """Count what became of the data: rows, tokens, lengths, losses, duplicates, steps, padding."""
    from pyralis.data.stats_table import stats_table
    from pyralis.train.data_stats import data_stats

    console, settings, _, built = _build(config, overrides or [])
    console.print(stats_table(built.report, data_stats(built.train, settings), settings.max_seq_length))
    if built.left_out is not None:
        console.print(f"rows left out are listed in {built.left_out}", markup=False)


def _build(config: str, overrides: list[str]) -> tuple[Console, Any, Any, Any]:
    """(console, checked config, tokenizer, built data); a bar shows how far it is, on stderr."""
    import sys

    from rich.console import Console

    from pyralis.cli.quiet import quiet_libraries

    quiet_libraries()
    from pyralis.data.progress import tokenising
    from pyralis.train.config.train_config import load_config
    from pyralis.train.setup import prepare_data

    # a pipe gets whole lines
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    messages = Console(stderr=True, highlight=False)
    loaded = load_config(config, overrides)
    for note in loaded.notes:
        messages.print(f"note: {note}", markup=False, style="dim")
    with tokenising(messages) as progress:
        prepared = prepare_data(loaded.config, progress)
    if prepared.data.from_cache:
        messages.print("(from the cache)", style="dim")
    return console, loaded.config, prepared.tokenizer, prepared.data
