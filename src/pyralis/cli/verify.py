"""`pyralis verify MODEL`: are the fast layers right for this model on this machine?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def verify(
        model: Annotated[str, typer.Argument(help="A model's or adapter's folder, or a name to fetch.")],
        adapter: Annotated[Path | None, typer.Option(help="A LoRA adapter's folder. Default: a random one.")] = None,
        data: Annotated[str | None, typer.Option(help="Training data. Default: a built-in text.")] = None,
        load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="NF4, as QLoRA trains.")] = False,
        rows: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 2,
        tokens: Annotated[
            int | None, typer.Option(min=8, help="Tokens of a row.", show_default="64 on a CPU, 512 on a GPU")
        ] = None,
        dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
        json_file: Annotated[
            Path | None, typer.Option("--json", help="Write every error of every tensor to this file.")
        ] = None,
    ) -> None:
        """Compare losses and gradients of stock transformers and of Pyralis with float64. Exit code 1: they differ."""
        import json

        from rich.console import Console

        from pyralis.cli.quiet import quiet_libraries

        quiet_libraries()
        from pyralis.models.dtype import check_dtype_name
        from pyralis.models.staging import write_text
        from pyralis.verify.run import VerifySettings, verify_model
        from pyralis.verify.show import show

        settings = VerifySettings(model, adapter, data, load_in_4bit, check_dtype_name(dtype), rows, tokens)
        with Console(stderr=True, highlight=False).status("reading", spinner="line") as status:
            found = verify_model(settings, progress=status.update)
        Console(highlight=False).print(show(found))
        if json_file is not None:
            write_text(json_file, json.dumps(found.as_dict(), indent=1) + "\n")
        if not found.passed:
            raise typer.Exit(1)
