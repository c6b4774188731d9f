"""Rules about evaluation, and about what goes by it: best models, early stopping, sample answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pyralis.train.config.findings import Finding, note, unused

if TYPE_CHECKING:
    from pyralis.train.config.train_config import TrainConfig

BEST_METRICS = ("loss", "eval_loss")
"""What `metric_for_best_model` may be: the only thing an evaluation measures."""


def evaluation_rule(config: TrainConfig) -> Iterator[Finding]:
    yield from _early_stopping(config)
    yield from _samples(config)
    if config.eval_file and config.eval_split:
        yield Finding(("eval_file", "eval_split"), "eval_file and eval_split are both given; keep one.")
    has_data = bool(config.eval_file or config.eval_split)
    if config.eval_strategy != "no" and not has_data:
        yield Finding(
            ("eval_strategy", "eval_file", "eval_split"),
            f"eval_strategy: {config.eval_strategy} needs evaluation data: give eval_file, or eval_split such as 0.05.",
        )
    if config.eval_strategy == "no":
        for name in ("reduce_lr_on_plateau", "greedy"):
            if config.lr_scheduler_type == name:
                yield Finding(
                    ("lr_scheduler_type", "eval_strategy"),
                    f"lr_scheduler_type: {name} steers by the evaluation loss; set eval_strategy to steps or epoch.",
                )
        if has_data:
            yield note("eval_strategy", message="eval_strategy: no: the evaluation data is not used.")
    if config.load_best_model_at_end and config.save_strategy != "best":
        yield from _best_model(config)
    if config.save_strategy == "best" and config.eval_strategy == "no":
        yield Finding(
            ("save_strategy", "eval_strategy"),
            "save_strategy: best goes by the evaluation loss: give eval_file or eval_split, and an eval_strategy.",
        )
    if config.metric_for_best_model not in (None, *BEST_METRICS):
        yield Finding(
            ("metric_for_best_model",),
            f"metric_for_best_model: {config.metric_for_best_model!r} is not measured; expected "
            f"{' or '.join(BEST_METRICS)}.",
        )
    elif config.metric_for_best_model and config.greater_is_better:
        yield Finding(("greater_is_better",), "greater_is_better: true would keep the model with the highest loss.")


def _best_model(config: TrainConfig) -> Iterator[Finding]:
    keys = ("load_best_model_at_end", "eval_strategy", "save_strategy", "eval_steps", "save_steps", "logging_steps")
    if config.eval_strategy != config.save_strategy:
        yield Finding(
            keys,
            "load_best_model_at_end: true needs eval_strategy and save_strategy to be the same, but they are "
            f"{config.eval_strategy} and {config.save_strategy}.",
        )
        return
    evaluate, save = config.eval_steps or config.logging_steps, config.save_steps
    if config.eval_strategy != "steps":
        return
    ratio = save / evaluate
    if (evaluate < 1) != (save < 1) or abs(ratio - round(ratio)) > 1e-6 or round(ratio) == 0:
        yield Finding(
            keys,
            f"load_best_model_at_end: true needs save_steps to be a multiple of eval_steps, not {save} of {evaluate}.",
        )


def _early_stopping(config: TrainConfig) -> Iterator[Finding]:
    if config.early_stopping_patience is None:
        yield from unused(config, ("early_stopping_threshold",), "early_stopping_patience is not given")
    elif config.eval_strategy == "no":
        yield Finding(
            ("early_stopping_patience", "eval_strategy"),
            f"early_stopping_patience: {config.early_stopping_patience} counts evaluations, and there are none: give "
            "eval_file or eval_split, and an eval_strategy.",
        )
    elif not config.load_best_model_at_end:
        yield note(
            *("early_stopping_patience", "load_best_model_at_end"),
            message="early_stopping_patience: the result is the last model, which is past the best one; "
            "load_best_model_at_end: true makes it the best one.",
        )


def _samples(config: TrainConfig) -> Iterator[Finding]:
    if config.sample_at_eval and not config.sample_prompts:
        yield from unused(config, ("sample_at_eval",), "there are no sample_prompts")
    elif config.sample_at_eval and config.eval_strategy == "no":
        yield from unused(config, ("sample_at_eval",), "nothing is evaluated")
