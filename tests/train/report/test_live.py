"""The live line: what fits into which width, and where printed and logged lines go."""

from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from pyralis.train.report import live
from pyralis.train.report.line import Part, bar, fit, sparkline
from pyralis.train.report.live import LiveLine
from pyralis.train.report.metrics import Metric, MetricsCallback, StepMetrics


class Run:
    """Drives the callbacks as the Trainer does."""

    def __init__(self, console: Console, steps: int = 300) -> None:
        self.tokens = 0
        self.metrics = MetricsCallback(None, lambda: (self.tokens, 3 * self.tokens), mfu=lambda _: 0.41)
        self.line = LiveLine(self.metrics, console)
        self.state = TrainerState(max_steps=steps, is_world_process_zero=True)
        self.control = TrainerControl()
        self.call("on_train_begin")

    def call(self, event: str, **kwargs: Any) -> None:
        for callback in (self.metrics, self.line):
            arguments: Any = None  # neither callback looks at the TrainingArguments
            getattr(callback, event)(arguments, self.state, self.control, **kwargs)

    def step(self, loss: float | None = None) -> None:
        self.state.global_step += 1
        self.tokens += 1000
        self.call("on_step_end")
        if loss is not None:
            self.call("on_log", logs={"loss": loss, "learning_rate": 2e-4, "grad_norm": 0.53})


@pytest.fixture
def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


@pytest.fixture
def terminal() -> Iterator[Console]:
    stdout, stderr = sys.stdout, sys.stderr
    yield Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    assert (sys.stdout, sys.stderr) == (stdout, stderr)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drawn(run: Run, width: int, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, color_system=None)
    with console.capture() as capture:
        console.print(run.line)
    return capture.get().rstrip("\n")


def test_plain_lines_are_one_a_log_and_aligned(plain: Console) -> None:
    run = Run(plain)
    for loss in (2.5, None, 12.25, 0.0005):
        run.step(loss)
    lines = output(plain).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step   1/300  loss  2.5000  lr 2.00e-04  grad  0.53")
    assert {line.index("lr ") for line in lines} == {lines[0].index("lr ")}
    assert {line.index(" GiB") for line in lines} == {lines[0].index(" GiB")}


def test_a_wide_line_shows_everything(plain: Console) -> None:
    run = Run(plain, steps=6)
    for loss in (2.0, 1.5, 1.0):
        run.step(loss)
    line = drawn(run, 160)
    for part in (
        "3/6",
        "━" * 8 + "─" * 8,
        "loss 1.0000",
        "█▅▁",
        "lr 2.0e-4",
        "grad 0.53",
        "sup tok/s",
        "GiB",
        "MFU 41%",
        "ETA",
    ):
        assert part in line, part


def test_eighty_columns_hold_what_matters(plain: Console) -> None:
    run = Run(plain)
    for loss in (2.0, 1.5, 1.0):
        run.step(loss)
    line = drawn(run, 80)
    for part in ("3/300", "loss 1.0000", "lr 2.0e-4", "grad 0.53", "sup/s", "GiB", "ETA"):
        assert part in line, part


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_it_never_wraps(plain: Console, encoding: str) -> None:
    run = Run(plain, steps=123456)
    for i in range(25):
        run.step(2.0 + math.sin(i))
    for width in range(20, 200):
        line = drawn(run, width, encoding)
        assert "\n" not in line
        assert cell_len(line) < width
        assert line.isascii() or encoding == "utf-8"
        assert "25/123456" in line


def test_pieces_are_shortened_before_the_least_important_are_left_out() -> None:
    parts = [Part(1, "", ["aaaa"]), Part(3, "", ["bbbbbb", "bb"]), Part(2, "", ["cccc", "c"])]
    assert [fit(parts, width).plain for width in (18, 15, 12, 5, 3, 1)] == [
        "aaaa  bbbbbb  cccc", "aaaa  bbbbbb  c", "aaaa  bb  c", "bb  c", "bb", "c",
    ]  # fmt: skip


def test_the_step_moves_with_every_step_and_the_loss_with_every_log(plain: Console) -> None:
    run = Run(plain)
    assert "waiting for the first loss" in drawn(run, 80)
    run.step(2.0)
    run.step()
    line = drawn(run, 80)
    assert "2/300" in line
    assert "loss 2.0000" in line


def test_remaining_time_leaves_the_first_step_out(plain: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 101.0, 102.0, 104.0])  # the first step took 100 s, the others 1, 1 and 2
    monkeypatch.setattr(live.time, "monotonic", lambda: next(times))
    run = Run(plain, steps=10)
    run.step()
    assert run.line.eta_seconds is None
    for _ in range(3):
        run.step()
    assert run.line.eta_seconds == pytest.approx(6 * 4 / 3)


def test_evaluation_shows_its_progress_and_result(terminal: Console) -> None:
    run = Run(terminal)
    run.step(2.0)
    run.call("on_prediction_step", eval_dataloader=[0] * 4)
    assert "evaluating 1/4" in drawn(run, 80)
    run.call("on_prediction_step", eval_dataloader=iter([0]))
    assert "evaluating 2" in drawn(run, 80)
    run.call("on_evaluate", metrics={"eval_loss": 1.0, "eval_runtime": 65.0})
    assert "evaluating" not in drawn(run, 80)
    run.call("on_train_end")
    assert "step   1  eval loss 1.0000  perplexity 2.718   1:05" in output(terminal)


def test_on_a_terminal_what_is_printed_and_logged_stands_above_the_line(terminal: Console) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("test_live")
    logger.addHandler(handler)
    try:
        run = Run(terminal)
        run.step(2.0)
        print("printed by a callback")
        logger.warning("logged by a library")
        run.call("on_train_end")
        assert handler.stream is sys.stderr
    finally:
        logger.removeHandler(handler)
    text = output(terminal)
    assert text.index("printed by a callback\n") < text.index("logged by a library\n") < text.rindex("loss 2.0000")


def test_close_may_be_called_twice_and_after_a_crash(terminal: Console) -> None:
    run = Run(terminal)
    run.step(2.0)
    run.line.close()
    run.line.close()
    assert "loss 2.0000" in output(terminal)


def test_a_resumed_run_shows_the_losses_before(plain: Console, history: list[Metric]) -> None:
    metrics = MetricsCallback(None, lambda: (0, 0))
    metrics.history = history
    line = LiveLine(metrics, plain)
    arguments: TrainingArguments = None  # type: ignore[assignment]
    line.on_train_begin(arguments, TrainerState(max_steps=80, global_step=40), TrainerControl())
    assert list(line._losses) == [m.loss for m in history if isinstance(m, StepMetrics)][-20:]


@pytest.mark.parametrize(
    ("values", "expected"), [([], ""), ([math.nan], ""), ([1.0, 1.0], "▁▁"), ([0.0, math.inf, 7.0, 3.5], "▁█▅")]
)
def test_sparkline(values: list[float], expected: str) -> None:
    assert sparkline(values) == expected


def test_bar() -> None:
    draw: Callable[..., str] = bar
    assert [draw(share, 4, False) for share in (0.0, 0.49, 0.5, 1.0, 1.2)] == ["----", "#---", "##--", "####", "####"]


def test_chinese_where_the_locale_is_and_the_output_can_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    plain = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), width=80)
    run = Run(plain, steps=3)
    with plain.capture() as capture:
        for loss in (2.0, 1.5):
            run.step(loss)
        run.call("on_evaluate", metrics={"eval_loss": 1.0, "eval_runtime": 65.0})
        run.call("on_save")
    text = capture.get()
    for part in ("步 1/3", "损失  1.5000", "学习率 2.00e-04", "梯度  0.53", "监督 tok/s", "MFU 41%", "剩余"):
        assert part in text, part
    assert "步 2  评估损失 1.0000  困惑度 2.718   1:05" in text
    assert "步 2  已保存检查点" in text
    for width in range(20, 200):
        assert cell_len(drawn(run, width)) < width
    assert all(part in drawn(run, 80) for part in ("2/3", "损失 1.5000", "监督/s", "GiB", "剩余"))

    ascii_only = Run(Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80))
    ascii_only.step(2.0)
    assert drawn(ascii_only, 160, "ascii").isascii()


def test_a_run_that_stopped_early_says_why(plain: Console) -> None:
    run = Run(plain)
    run.step(2.0)
    run.metrics.record_event("stopped_early", "2 evaluations in a row did not bring the loss below its lowest")
    run.call("on_train_end")
    assert "step   1  stopped early: 2 evaluations in a row did not" in output(plain)
