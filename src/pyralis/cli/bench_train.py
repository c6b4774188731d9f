"""`pyralis bench train`: whole training steps beside other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL = "llama3-8b, qwen2-7b, mistral-7b, llama3.2-1b, qwen2-1.5b, gemma2-2b, tinyllama or tiny, all made here; "
CHECKPOINTING = "What a peer keeps for the backward: PEER=VARIANT,...; may be given again. See docs/benchmarks.md."


def register_train(bench: typer.Typer) -> None:
    @bench.command()
    def train(
        model: Annotated[str, typer.Option(help=MODEL + "or a folder.")] = "llama3-8b",
        mode: Annotated[str, typer.Option(help="qlora, lora or full.")] = "qlora",
        peers: Annotated[str, typer.Option(help="Besides Pyralis: hf, hf-compile, hf-trl, liger, unsloth.")] = "hf",
        shapes: Annotated[str, typer.Option(help="Batch x tokens.")] = "1x1024,2x2048",
        checkpointing: Annotated[list[str] | None, typer.Option(help=CHECKPOINTING)] = None,
        loop: Annotated[str, typer.Option(help="bare, trainer, or both between commas.")] = "bare",
        rank: Annotated[int, typer.Option(min=1, help="LoRA's.")] = 16,
        dropout: Annotated[float, typer.Option(min=0, max=0.9, help="LoRA's.")] = 0.0,
        steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 10,
        warmup: Annotated[int, typer.Option(min=1, help="Steps before them.")] = 3,
        profile: Annotated[bool, typer.Option("--profile", help="Count kernels in one more step.")] = False,
        no_pyralis: Annotated[bool, typer.Option("--no-pyralis", help="The peers alone.")] = False,
        time_limit: Annotated[float | None, typer.Option(min=1, help="Seconds for all; the rest is not run.")] = None,
        work_dir: Annotated[Path | None, typer.Option(help="For the model and logs; by default in the cache.")] = None,
        out: Annotated[Path, typer.Option(help="For train-MODEL-MODE.json, .png.")] = Path("benchmarks/results"),
    ) -> None:
        """Time training steps beside other libraries, each in a process of its own; compare their first losses."""
        from pyralis.bench.train.command import bench_train
        from pyralis.bench.train.settings import TrainBench, parse_loops, parse_mode, parse_peers, parse_shapes
        from pyralis.models.fetch import cache_root

        known = parse_mode(mode)
        chosen = parse_peers(peers if no_pyralis else f"pyralis,{peers}", checkpointing or [], known)
        settings = TrainBench(
            model, known, parse_shapes(shapes), chosen, parse_loops(loop),
            rank=rank, dropout=dropout, steps=steps, warmup=warmup, profile=profile,
        )  # fmt: skip

        def report(line: str) -> None:
            typer.echo(line, err=True)

        wrong = bench_train(settings, work_dir or cache_root() / "bench", out, time_limit, report)
        for line in wrong:
            report(line)
        if wrong:
            raise typer.Exit(1)
