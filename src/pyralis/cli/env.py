"""`pyralis env`: the machine, the versions, and what works here. Paste it into bug reports."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def env(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
        """Show machine, versions, and whether bf16, fp16 and NF4 work on this device."""
        from rich.console import Console
        from rich.table import Table

        from pyralis.train.report.environment import describe_environment, probe_capabilities

        environment, capabilities = describe_environment(), probe_capabilities()
        if as_json:
            typer.echo(json.dumps(asdict(environment) | {"capabilities": [asdict(c) for c in capabilities]}, indent=2))
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("platform", environment.platform)
        table.add_row("python", environment.python)
        for name, version in environment.packages:
            table.add_row(name, version)
        table.add_row("cuda", environment.cuda or "none: this torch is built for the CPU")
        table.add_row("cpu", f"{environment.cpu}, {environment.cores} cores, {environment.memory_gib:.0f} GiB")
        for index, gpu in enumerate(environment.gpus):
            major, minor = gpu.capability
            table.add_row(f"gpu {index}", f"{gpu.name}, {gpu.memory_gib:.1f} GiB, compute capability {major}.{minor}")
        if not environment.gpus:
            table.add_row("gpu", "none that torch can use")
        for capability in capabilities:
            text = "works" if capability.works else "does not work"
            table.add_row(capability.name, f"{text} ({capability.note})" if capability.note else text)
        Console(highlight=False, markup=False).print(table)
