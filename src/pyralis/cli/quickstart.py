"""`pyralis quickstart`: fetch a small model, fine-tune it, compare its answers."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def quickstart(
        output: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("output/quickstart"),
    ) -> None:
        """Fine-tune a real 135M model on this machine and compare its answers, in a few minutes."""
        from pyralis.cli.quiet import set_up_logging

        set_up_logging()
        from pyralis.models.fetch import fetch_model
        from pyralis.train.quickstart import MODEL_NAME, quickstart_config
        from pyralis.train.run import train

        model_dir = fetch_model(MODEL_NAME)
        command = command_name()
        result = train(
            quickstart_config(model_dir, output),
            next_commands=(
                (f"{command} chat {output}", "talk to the model you just made"),
                (f"{command} export merge {output} output/merged", "one folder that any program loads"),
                (
                    f"{command} init --model {MODEL_NAME} --mode lora --train-file your.jsonl",
                    "a config for your own data",
                ),
            ),
        )
        if result.status == "interrupted":
            raise typer.Exit(130)


def command_name() -> str:
    """How to call `pyralis` from the shell this was started in: its path if it is not on PATH."""
    if shutil.which("pyralis"):
        return "pyralis"
    script = Path(sys.argv[0]).absolute()
    if script.name != "pyralis":
        return f"{sys.executable} -m pyralis"
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)
