"""What is seen while a run goes on: one live line on a terminal, plain aligned lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyralis.train.report.format import count_text, duration_text, gib_text, loss_text, rewards_text
from pyralis.train.report.language import chinese_locale
from pyralis.train.report.line import Part, bar, fit, sparkline
from pyralis.train.report.metrics import EvalMetrics, MetricsCallback, RunEvent, StepMetrics

ETA_STEPS = 50
"""The remaining time is reckoned from the mean of so many last steps."""


class LiveLine(TrainerCallback):
    """Shows step, loss, learning rate, gradient norm, rates, memory and remaining time.

    Add it behind `metrics`, which measures, and with the Trainer's own ProgressCallback and PrinterCallback removed.
    On a terminal the line is redrawn several times a second by a thread; whatever is printed or logged meanwhile
    stands above it. Elsewhere each logged step is one line. It is in Chinese where the locale is and the output can
    show it.
    """

    def __init__(self, metrics: MetricsCallback, console: Console | None = None) -> None:
        self.metrics = metrics
        self.console = console or Console(highlight=False)
        self.step = self.max_steps = 0
        self._losses: deque[float] = deque(maxlen=20)
        self._times: deque[tuple[int, float]] = deque(maxlen=ETA_STEPS + 1)
        self._evaluating: tuple[int, int | None] | None = None
        self._live: Live | None = None
        self._chinese = chinese_locale() and self.console.encoding.lower().startswith("utf")
        self._streams: list[tuple[logging.StreamHandler, Any]] = []

    # ---- callbacks ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step, self.max_steps = state.global_step, state.max_steps
        self._losses.extend(m.loss for m in self.metrics.history if isinstance(m, StepMetrics))
        if state.is_world_process_zero and self.console.is_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=8)
            self._live.start()
            self._streams = _redirect_log_handlers()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step = state.global_step
        self._times.append((self.step, time.monotonic()))  # from the first step's end: that one compiles and warms up

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        row = self.metrics.latest
        if "loss" not in kwargs["logs"] or row is None:
            return
        self._losses.append(row.loss)
        if self._live is None and state.is_world_process_zero:
            self.console.print(self._plain_line(row), markup=False, soft_wrap=True)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        done = self._evaluating[0] if self._evaluating else 0
        try:
            self._evaluating = (done + 1, len(eval_dataloader))
        except TypeError:  # an iterable dataset has no length
            self._evaluating = (done + 1, None)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._evaluating = None
        row = self.metrics.history[-1] if self.metrics.history else None
        if isinstance(row, EvalMetrics) and state.is_world_process_zero:
            perplexity = row.perplexity
            beside = (
                self._rewards(row) if perplexity is None else f"{self._say('perplexity', '困惑度')} {perplexity:.4g}"
            )
            took = f"   {duration_text(row.seconds)}" if row.seconds is not None else ""
            self._above(row.step, f"{self._say('eval loss', '评估损失')} {loss_text(row.loss)}  {beside}{took}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._above(state.global_step, self._say("checkpoint saved", "已保存检查点"))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        event = next((m for m in self.metrics.history if isinstance(m, RunEvent) and m.event == "stopped_early"), None)
        if event is not None and state.is_world_process_zero:
            chinese = "提前停止：评估损失不再下降"
            self._above(event.step, self._say(f"stopped early: {event.message}", chinese))
        self.close()

    def close(self) -> None:
        """Leave the line as it is and give the terminal back. Also to be called when the run ends by an exception."""
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams = []
        if self._live:
            self._live.stop()
            self._live = None

    # ---- drawing ----

    def _say(self, english: str, chinese: str) -> str:
        return chinese if self._chinese else english

    def _above(self, step: int, text: str) -> None:
        """A line of its own."""
        self.console.print(f"{self._step_text(step)}  {text}", markup=False, soft_wrap=self._live is None)

    def _step_text(self, step: int) -> str:
        return f"{self._say('step', '步')} {step:>{self._digits}}"

    @property
    def _digits(self) -> int:
        return len(str(self.max_steps))

    @property
    def eta_seconds(self) -> float | None:
        """Remaining steps x the mean time of the last ones; None before the second step."""
        if len(self._times) < 2:
            return None
        (first, begin), (last, end) = self._times[0], self._times[-1]
        return (self.max_steps - self.step) * (end - begin) / max(last - first, 1)

    def _plain_line(self, row: StepMetrics) -> str:
        parts = [
            f"{self._step_text(row.step)}/{self.max_steps}",
            f"{self._say('loss', '损失')} {loss_text(row.loss):>7}",
            f"{self._say('lr', '学习率')} {row.learning_rate:.2e}",
            f"{self._say('grad', '梯度')} {_norm(row.grad_norm):>5}",
            f"{count_text(row.supervised_tokens_per_second):>5} {self._say('sup tok/s', '监督 tok/s')}",
            f"{count_text(row.total_tokens_per_second):>5} tok/s",
            _mfu(row),
            f"{gib_text(_memory(row)):>8}",
            self._rewards(row),
            self._time_text(row),
        ]
        return "  ".join(part for part in parts if part)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unicode = (options.encoding or "").lower().startswith("utf")
        yield fit(self._parts(unicode), options.max_width - 1)

    def _parts(self, unicode: bool) -> list[Part]:
        share = self.step / self.max_steps if self.max_steps else 0.0
        head = Part(9, "bold", [f"{self.step:>{self._digits}}/{self.max_steps}"])
        if self._evaluating:
            done, total = self._evaluating
            return [
                head,
                Part(8, "yellow", [f"{self._say('evaluating', '评估')} {done}" + (f"/{total}" if total else "")]),
            ]
        progress = Part(4, "cyan", [*(bar(share, width, unicode) for width in (16, 12, 8)), f"{share:.0%}"])
        row = self.metrics.latest
        if row is None:
            return [head, progress, Part(8, "dim", [self._say("waiting for the first loss", "等待第一个损失")])]
        sparks = sparkline(list(self._losses)) if unicode else ""
        supervised = count_text(row.supervised_tokens_per_second)
        sound = math.isfinite(row.loss)
        rate = f"{row.learning_rate:.1e}".replace("e-0", "e-").replace("e+00", "")
        return [
            head,
            progress,
            Part(8, "bold green" if sound else "bold red", [f"{self._say('loss', '损失')} {loss_text(row.loss)}"]),
            Part(3, "green", [sparks[-size:] for size in (20, 14, 10, 6)]),
            Part(6, "cyan", [self._rewards(row), ""]),
            Part(5, "", [f"{self._say('lr', '学习率')} {rate}", f"lr {rate}"]),
            Part(5, "", [f"{self._say('grad', '梯度')} {_norm(row.grad_norm)}"]),
            Part(
                6,
                "",
                [
                    f"{supervised} {self._say('sup tok/s', '监督 tok/s')}",
                    f"{supervised} {self._say('sup/s', '监督/s')}",
                ],
            ),
            Part(2, "", [f"{count_text(row.total_tokens_per_second)} tok/s"]),
            Part(6, "", [gib_text(_memory(row))]),
            Part(1, "", [_mfu(row)]),
            Part(7, "magenta", [self._time_text(row)]),
        ]

    def _time_text(self, row: StepMetrics) -> str:
        if self.step >= self.max_steps:
            return f"{self._say('took', '用时')} {duration_text(row.elapsed_seconds)}"
        return f"{self._say('ETA', '剩余')} {duration_text(self.eta_seconds)}"

    def _rewards(self, row: StepMetrics | EvalMetrics) -> str:
        return rewards_text(row.reward_accuracy, row.reward_margin, chinese=self._chinese)


def _mfu(row: StepMetrics) -> str:
    return "" if row.mfu is None else f"MFU {row.mfu:.0%}"


def _memory(row: StepMetrics) -> float | None:
    return row.peak_memory_gib if row.peak_memory_gib is not None else row.peak_host_memory_gib


def _norm(grad_norm: float | None) -> str:
    return "-" if grad_norm is None else f"{grad_norm:.2f}" if grad_norm < 100 else f"{grad_norm:.3g}"


def _redirect_log_handlers() -> list[tuple[logging.StreamHandler, Any]]:
    """Send handlers that hold the terminal's own streams through the live display, which has put itself in
    `sys.stdout` and `sys.stderr`: written past it their lines would land inside the live one. Returns what to restore.
    """
    behind = {id(getattr(proxy, "rich_proxied_file", None)): proxy for proxy in (sys.stdout, sys.stderr)}
    loggers = [
        logging.getLogger(),
        *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)),
    ]
    changed = []
    for handler in {id(h): h for logger in loggers for h in logger.handlers}.values():
        if isinstance(handler, logging.StreamHandler) and (proxy := behind.get(id(handler.stream))) is not None:
            changed.append((handler, handler.stream))
            handler.setStream(proxy)
    return changed
