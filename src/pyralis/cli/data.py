"""`pyralis data CONFIG [key=value ...]`: what a config's data becomes, before anything is trained."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def data(
        config: Annotated[str, typer.Argument(help="A JSON or YAML config; its model gives the tokenizer.")],
        overrides: Annotated[
            list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override fields of the config.")
        ] = None,
        rows: Annotated[int, typer.Option("--rows", min=0, help="How many rows to show.")] = 3,
        evaluation: Annotated[bool, typer.Option("--eval", help="Show rows of the evaluation data instead.")] = False,
    ) -> None:
        """Read, check and tokenise the data of a config, report on it, and show what is learnt of it."""
        from rich.console import Console

        from pyralis.cli.quiet import quiet_libraries

        quiet_libraries()
        from pyralis.data.dataset import DataSettings, build_dataset, template_for
        from pyralis.data.preview import preview
        from pyralis.errors import DataError
        from pyralis.models.tokenizer import load_tokenizer
        from pyralis.train.config import load_config

        # a pipe gets whole lines
        console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        messages = Console(stderr=True, highlight=False)
        loaded = load_config(config, overrides or ())
        for note in loaded.notes:
            messages.print(f"note: {note}", markup=False, style="dim")
        settings = loaded.config
        tokenizer = load_tokenizer(
            settings.model_name_or_path,
            revision=settings.model_revision,
            trust_remote_code=settings.trust_remote_code,
        )
        template = template_for(settings.task_type, settings.template_name, tokenizer, system=settings.system)
        with messages.status("reading data") as status:
            built = build_dataset(
                DataSettings.from_config(settings),
                tokenizer,
                template,
                progress=lambda done: status.update(f"tokenising: {done:,} rows"),
            )
        for line in built.report.summary_lines():
            console.print(line, markup=False)
        if built.from_cache:
            messages.print("(from the cache)", style="dim")
        if evaluation and built.eval is None:
            raise DataError("There is no evaluation data: the config has neither eval_file nor eval_split.")
        if rows:
            console.print()
            console.print(preview(built.eval if evaluation and built.eval else built.train, tokenizer, rows))
