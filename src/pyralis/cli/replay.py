"""`pyralis replay OUTPUT/nan-step-N`: where did the first value that is not finite arise?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def replay(
        folder: Annotated[Path, typer.Argument(help="A step that a run kept, OUTPUT/nan-step-N.")],
        trust: Annotated[
            bool,
            typer.Option("--trust", help="Allow what the run's config allows: the model's own code, pickled weights."),
        ] = False,
    ) -> None:
        """Run a step again whose loss or gradient was not finite, and say where it goes wrong."""
        from rich.console import Console
        from rich.text import Text

        from pyralis.cli.quiet import quiet_libraries

        quiet_libraries()
        from pyralis.train.watch.replay import replay as run

        with Console(stderr=True, highlight=False).status("reading", spinner="line") as status:
            found = run(folder, progress=status.update, trust=trust)
        console, saved = Console(highlight=False), found.saved
        console.print(Text(f"step {saved.step}, loss {saved.loss:g}, seed {saved.seed}; with {found.weights}"))
        console.print(Text(f"rows: {saved.rows()}"))
        for one in found.found:
            part = f" · micro-batch {one.number}" if len(saved.micro_batches) > 1 else ""
            console.print()
            console.print(Text(f"{str(one.dtype).removeprefix('torch.')}{part}", "bold"))
            console.print(Text(one.origin.words, "green" if one.origin.stage == "nowhere" else "red"))
        console.print()
        console.print(Text(found.advice()))
