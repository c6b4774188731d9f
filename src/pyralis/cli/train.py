"""`pyralis train CONFIG [key=value ...]`, and with `--check` only what would run."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pyralis.cli.processes import end_if_grouped
from pyralis.cli.stopped import EXIT_CODES, Stopped, stoppable, what_is_kept


def register(app: typer.Typer) -> None:
    @app.command()
    def train(
        config: Annotated[str, typer.Argument(help="A JSON or YAML config; see train_args/ and `pyralis init`.")],
        overrides: Annotated[
            list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override fields of the config.")
        ] = None,
        check: Annotated[
            bool, typer.Option("--check", help="Check the config and print it; needs no model, data or GPU.")
        ] = False,
        as_json: Annotated[
            bool, typer.Option("--json", help="With --check: print the effective config as JSON.")
        ] = False,
        gpus: Annotated[
            int | None, typer.Option("--gpus", help="Train on so many GPUs of this machine, a process for each.")
        ] = None,
    ) -> None:
        """Fine-tune a model as a config says: pretrain, SFT or DPO, by full, LoRA or QLoRA."""
        if check:
            from rich.console import Console

            from pyralis.train.config.check_report import format_check, json_check
            from pyralis.train.config.train_config import load_config

            loaded = load_config(config, overrides or ())
            if as_json:
                typer.echo(json_check(loaded))
            else:
                Console(highlight=False).print(format_check(loaded))
            return
        if gpus is not None and gpus != 1:
            raise typer.Exit(_on_gpus(gpus, config, overrides or ()))
        try:
            with stoppable():
                code = _train(config, overrides or ())
        except (Stopped, KeyboardInterrupt) as stopped:  # the latter at a second Ctrl-C in the training loop
            by = stopped.signal if isinstance(stopped, Stopped) else signal.SIGINT
            _say_stopped(by.name, config, overrides or ())
            code = EXIT_CODES[by]
        end_if_grouped(code)
        if code:
            raise typer.Exit(code)


def _train(config: str, overrides: Sequence[str]) -> int:
    from pyralis.cli.quiet import set_up_logging

    set_up_logging()
    from pyralis.train.run import train as run

    result = run(config, overrides)
    if result.status == "interrupted":
        return EXIT_CODES[signal.Signals[result.signal or "SIGINT"]]
    return 0


def _say_stopped(by: str, config: str, overrides: Sequence[str]) -> None:
    from pyralis.errors import ConfigError
    from pyralis.train.config.train_config import load_config

    try:
        kept = what_is_kept(Path(load_config(config, overrides).config.output_dir))
    except ConfigError:  # it came before the config was read
        kept = "Nothing had been trained yet."
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(f"Stopped by {by}. {kept}", err=True)


def _on_gpus(count: int, config: str, overrides: Sequence[str]) -> int:
    from pyralis.cli.processes import check_gpus, run_processes, train_command
    from pyralis.train.config.train_config import load_config

    check_gpus(count)
    load_config(config, overrides)  # what is wrong with it is said once
    return run_processes(count, train_command(config, overrides))
