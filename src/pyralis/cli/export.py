"""`pyralis export merge DIR OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    export = typer.Typer(no_args_is_help=True, help="Turn a trained adapter into what other programs read.")
    app.add_typer(export, name="export")

    @export.callback()
    def group() -> None:
        """Keeps `merge` a subcommand while it is the only one."""

    @export.command()
    def merge(
        adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
        out: Annotated[Path, typer.Argument(help="The folder to write the merged model to.")],
        base: Annotated[str | None, typer.Option(help="The base model, if it is not where the adapter says.")] = None,
        dtype: Annotated[
            str, typer.Option(help="Of the weights: auto (as the base has them), float32, bfloat16, float16.")
        ] = "auto",
        base_precision: Annotated[
            str,
            typer.Option(help="For QLoRA: merge onto the 4-bit weights it was `trained` on, or the `original` ones."),
        ] = "trained",
        max_shard_size: Annotated[str, typer.Option(help="The largest weight file.")] = "5GB",
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is at OUT.")] = False,
        trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    ) -> None:
        """Merge an adapter into its base model: a standard folder that transformers, vLLM and others load."""
        from pyralis.cli.quiet import quiet_libraries

        quiet_libraries()
        from pyralis.export.merge import check_base_precision, merge_adapter
        from pyralis.models.dtype import check_dtype_name

        merge_adapter(
            adapter,
            out,
            base=base,
            dtype=check_dtype_name(dtype),
            base_precision=check_base_precision(base_precision),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            report=lambda line: typer.echo(line, err=True),
        )
        typer.echo(str(out))
