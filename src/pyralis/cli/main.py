"""The command `pyralis`: registers the subcommands and turns errors into one clear message."""

from __future__ import annotations

import errno
import importlib
import sys
from typing import NoReturn

import typer

from pyralis import __version__
from pyralis.cli.processes import end_if_grouped
from pyralis.cli.quiet import set_up_process
from pyralis.errors import PyralisError, SaveError

# Each module has `register(app)`. They import their heavy dependencies inside the command, so that `--help` is quick.
COMMANDS: tuple[str, ...] = (
    *("quickstart", "train", "config", "data", "fetch", "chat", "export", "env", "bench", "verify", "plan", "compare"),
    "replay",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"pyralis {__version__}")
        raise typer.Exit


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="pyralis",
        help="Fine-tune large language models: exact, fast, in little memory.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    ) -> None:
        pass

    for name in COMMANDS:
        importlib.import_module(f"pyralis.cli.{name}").register(app)
    return app


def main(args: list[str] | None = None) -> None:
    """Entry point; never returns. Exit codes: 0 done, 1 failed, 2 bad input, 3 download failed, 4 not saved, 75 stopped
    by SIGTERM, 130 by Ctrl-C."""
    set_up_process()
    try:
        build_app()(args=args, standalone_mode=True)
    except PyralisError as error:
        _end(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        full = SaveError(f"{error.strerror}{where}. Make room, then start again; checkpoints that are there are whole.")
        _end(full)


def _end(error: PyralisError) -> NoReturn:
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    console.print(f"[bold red]{type(error).__name__}[/]: ", end="")
    console.print(str(error), markup=False)
    end_if_grouped(error.exit_code)
    sys.exit(error.exit_code)
