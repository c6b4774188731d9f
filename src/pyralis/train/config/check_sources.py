"""What a config says of weighted sources and streams, and how it must fit together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pyralis.train.config.findings import Finding, unused

if TYPE_CHECKING:
    from pyralis.train.config.train_config import TrainConfig


def sources_rule(config: TrainConfig) -> Iterator[Finding]:
    entries = 1 if isinstance(config.train_file, str) else len(config.train_file)
    if config.source_weights is None:
        yield from unused(config, ("stopping_strategy",), "there are no source_weights")
    elif len(config.source_weights) != entries or min(config.source_weights) <= 0:
        yield Finding(
            ("source_weights", "train_file"),
            f"source_weights: {config.source_weights} does not fit train_file: expected {entries} numbers above 0, one "
            "for each entry.",
        )
    if not config.streaming:
        yield from unused(config, ("stream_buffer_size",), "streaming is false")
        return
    yield from unused(config, ("stopping_strategy", "tokenize_num_workers"), "a stream has no end and no preparation")
    yield from _stream(config)


def _stream(config: TrainConfig) -> Iterator[Finding]:
    if config.task_type != "pretrain" or not config.packing:
        yield Finding(
            ("streaming", "task_type", "packing"),
            "streaming: true is for packed text: set task_type: pretrain and packing: true.",
        )
    if config.max_steps <= 0:
        yield Finding(("streaming", "max_steps"), "streaming: true has no end: say how long to train by max_steps.")
    for name, given, advice in (
        ("eval_split", config.eval_split, "give eval_file"),
        ("max_samples", config.max_samples, "max_steps says how much is read"),
        (
            "dataloader_num_workers",
            config.dataloader_num_workers,
            "a stream is read in the main process: set it to 0",
        ),
    ):
        if given:
            yield Finding(
                ("streaming", name), f"streaming: true does not go with {name}: {given}; {advice}."
            )  # fmt: skip
