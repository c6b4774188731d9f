"""`pyralis bench`: measure this GPU. `pyralis bench ops` times every op, `pyralis bench train` whole training steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyralis.cli.bench_train import register_train


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Measure this GPU: ops beside their roofline, training steps beside other libraries.")
    app.add_typer(bench, name="bench")

    @bench.callback(invoke_without_command=True)
    def everything(context: typer.Context) -> None:
        """Without a subcommand: `ops` with its defaults, into benchmarks/results."""
        if context.invoked_subcommand is None:
            context.invoke(ops, op=None, out=Path("benchmarks/results"))

    @bench.command()
    def ops(
        op: Annotated[list[str] | None, typer.Option(help="An op's name; may be given again. Default: all.")] = None,
        out: Annotated[Path | None, typer.Option(help="Folder for ops.json and ops.png.")] = None,
        shapes: Annotated[str, typer.Option(help="Models whose sizes to take.")] = "llama3-8b,qwen2-7b",
        tokens: Annotated[str, typer.Option(help="Tokens in a micro-batch.")] = "1024,4096,16384",
        without: Annotated[str, typer.Option(help="Peers to leave out; torch.compile takes most of the time.")] = "",
    ) -> None:
        """Time every op: median, % of the roofline (measured in the same run), and its peers beside it."""
        from pyralis.bench.ops import bench_ops, op_names
        from pyralis.errors import ConfigError

        try:
            counts = [int(part) for part in _split(tokens)]
        except ValueError:
            raise ConfigError(f"--tokens {tokens!r}: expected whole numbers between commas, as 1024,4096") from None
        names, peers = op or op_names(), _split(without)
        bench_ops(names, _split(shapes), counts, out, lambda line: typer.echo(line, err=True), without=peers)

    register_train(bench)
