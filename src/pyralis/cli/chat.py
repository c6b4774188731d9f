"""`pyralis chat DIR`: talk to an adapter, a merged model or a base model."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def chat(
        model: Annotated[str, typer.Argument(help="An adapter's or model's folder, or a name to fetch.")],
        prompt: Annotated[
            str | None, typer.Option("--prompt", "-p", help="Answer this once, print only the answer, and leave.")
        ] = None,
        system: Annotated[str | None, typer.Option(help="The system text, instead of the template's.")] = None,
        temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
        top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this probability.")] = 1.0,
        top_k: Annotated[int, typer.Option(help="Sample among this many likeliest tokens; 0: all.")] = 0,
        max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 512,
        repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said becomes less likely.")] = 1.0,
        seed: Annotated[int | None, typer.Option(help="Makes sampled answers the same each time.")] = None,
        load_in_4bit: Annotated[
            bool | None,
            typer.Option(
                "--load-in-4bit/--no-load-in-4bit", help="Default: as the adapter was trained.", show_default=False
            ),
        ] = None,
        dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
        template: Annotated[str, typer.Option(help="A named chat template, for a model that has none.")] = "",
        base: Annotated[str | None, typer.Option(help="The base model, if it is not where the adapter says.")] = None,
        trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    ) -> None:
        """Talk to a fine-tuned or base model; answers are streamed. In a pipe, each line is a message."""
        import sys

        from pyralis.cli.conversation import Conversation
        from pyralis.cli.quiet import quiet_libraries

        quiet_libraries()
        from pyralis.models.dtype import check_dtype_name
        from pyralis.serve.chat import ChatOptions
        from pyralis.serve.load import ChatModelSettings, load_chat

        def notice(line: str) -> None:
            if prompt is None:
                typer.echo(f"({line})", err=True)

        options = ChatOptions(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
        settings = ChatModelSettings(
            model, base, load_in_4bit, check_dtype_name(dtype), template, system, trust_remote_code
        )
        conversation = Conversation(load_chat(settings, notice=notice), options, out=sys.stdout, err=sys.stderr)
        if prompt is not None:
            conversation.answer(prompt)
        else:
            conversation.run()
