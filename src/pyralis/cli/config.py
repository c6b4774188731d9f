"""`pyralis config schema`, `pyralis config explain KEY`, `pyralis init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    config_app = typer.Typer(help="What a config may hold.", no_args_is_help=True)
    config_app.command()(schema)
    config_app.command()(explain)
    app.add_typer(config_app, name="config")
    app.command()(init)


def schema() -> None:
    """Print the JSON Schema of configs, for editors: save it and name it in "$schema" or your editor's settings."""
    import json

    from pyralis.train.config.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def explain(key: Annotated[str, typer.Argument(help="A field, or an old name of one.")]) -> None:
    """Explain one field: what it takes, its default, what it does, where it comes from."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pyralis.train.config.schema import explain as explain_field

    found = explain_field(key)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "field": found.key + (f"  ({key} is read as it)" if key != found.key else ""),
        "takes": found.type,
        "default": found.default,
        "meaning": found.meaning,
        "from": found.origin,
        "old names": ", ".join(found.old_names),
    }
    for name, text in rows.items():
        if text:
            table.add_row(name, Text(text))
    Console(highlight=False).print(table)


def init(
    model: Annotated[str, typer.Option("--model", help="A local folder or a hub name.")],
    task: Annotated[str, typer.Option("--task", help="sft, pretrain or dpo.")] = "sft",
    mode: Annotated[str, typer.Option("--mode", help="full, lora or qlora.")] = "qlora",
    train_file: Annotated[str | None, typer.Option("--train-file", help="The training data.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write; .json for plain JSON, otherwise commented YAML.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a config to start from; it passes `pyralis train FILE --check`."""
    from pyralis.train.config.init import write_starting_config

    path = write_starting_config(model, task, mode, train_file=train_file, out=out, overwrite=force)
    typer.echo(f"Wrote {path}. Check it: pyralis train {path} --check")
