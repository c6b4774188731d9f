"""The panels, as they are on 80 columns without colours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from pyralis.train.report.format import loss_text
from pyralis.train.report.metric_rows import EvalMetrics, Metric
from pyralis.train.report.panel import FinalInfo, StartupInfo, final_panel, startup_panel
from pyralis.train.report.summary import summarise


def drawn(panel: RenderableType, width: int) -> str:
    console = Console(width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(panel)
    text = capture.get()
    assert {cell_len(line) for line in text.splitlines()} == {width}
    return text


def joined(text: str) -> str:
    """The content without the frame and the line breaks."""
    return "".join(line.strip("│ ") for line in text.splitlines()).replace(" ", "")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_startup_panel(startup: StartupInfo, width: int) -> None:
    content = joined(drawn(startup_panel(startup), width))
    for text in (
        "Pyralis · sft · qlora",
        "Qwen2.5-7B-Instruct · Qwen2ForCausalLM",
        "40.4M of 7.62B parameters (0.53 %) · qlora · bfloat16 · NF4",
        "NVIDIA H100 80GB HBM3",
        "12,345 rows · 4.32M tokens, 46 % of them supervised",
        "1 row · 400 tokens, 25 % of them supervised",
        "2 x 8 accumulated x 4 processes = 64 rows a step",
        "40 · 1 epoch",
        "adamw_torch · lr 0.0001 · linear",
        "stock transformers on all 28 layers",
        "17.9 GiB predicted of 79.1 GiB",
        "输出/很长的路径/nestednested",
        "43 rows were dropped",
        "the template is 'qwen'",
    ):
        assert text.replace(" ", "") in content, text


def test_what_is_not_known_is_left_out(startup: StartupInfo) -> None:
    bare = dataclasses.replace(
        startup,
        predicted_memory_gib=None,
        acceleration=(),
        notes=(),
        warnings=(),
        quantization=None,
        world_size=1,
        data=(),
    )
    text = drawn(startup_panel(bare), 80)
    for word in ("memory", "acceleration", "note ", "warning", "None", "processes", "data"):
        assert word not in text


def test_why_no_memory_is_predicted(startup: StartupInfo) -> None:
    stock = dataclasses.replace(startup, predicted_memory_gib=None, unpredicted="layer 0 runs stock (of its own kind)")
    text = drawn(startup_panel(stock), 120)
    assert "79.1 GiB · not predicted: layer 0 runs stock (of its own kind)" in text


def test_what_the_time_went_into(history: list[Metric]) -> None:
    timed = dataclasses.replace(summarise(history), seconds_by_part={"compute": 9.0, "data": 1.0})
    assert "forward and backward 90%, waiting for data 10%" in drawn(final_panel(FinalInfo(timed, Path("o"))), 100)


def test_facts_of_every_run_are_chinese_too(startup: StartupInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    plain = dataclasses.replace(startup, device="CPU, 2 threads", acceleration=("30 of 32 layers fast", "2 of 32: why"))
    text = drawn(startup_panel(plain), 120)
    for part in ("CPU，2 线程", "32 层中 30 层已加速", "2 of 32: why"):
        assert part in text, part


def test_final_panel(history: list[Metric]) -> None:
    info = FinalInfo(
        summarise(history), Path("output/run"), metrics=Path("run/metrics.jsonl"), report=Path("run/report.html"),
        next_commands=(("pyralis chat output/run", "talk to it"),), warnings=("[not] markup",),
    )  # fmt: skip
    text = drawn(final_panel(info), 80)
    for part in ("The loss fell by 78 %", "2.7945 → 0.5175", "lowest 0.6175 at step 40", "200 supervised tokens/s",
                 "1.25 GiB", "run/metrics.jsonl", "run/report.html", "pyralis chat output/run", "talk to it",
                 "[not] markup", "0:20 · 40 steps"):  # fmt: skip
        assert part in text, part
    assert "picture" not in text


def test_final_panel_of_a_run_that_did_nothing() -> None:
    text = drawn(final_panel(FinalInfo(summarise([]), Path("output/run"))), 80)
    assert "No step was trained." in text
    assert "speed" not in text
    assert "Next" not in text


def test_user_text_is_not_markup(startup: StartupInfo) -> None:
    text = drawn(startup_panel(dataclasses.replace(startup, model="[bold]x[/]", device="[red]y", notes=("[z]",))), 100)
    for part in ("[bold]x[/]", "[red]y", "[z]"):
        assert part in text


def test_a_long_command_goes_on_below_its_beginning() -> None:
    command = "pyralis init --model some-organisation/some-model --mode lora --train-file your.jsonl"
    info = FinalInfo(summarise([]), Path("output/run"), next_commands=[(command, "a config")])
    lines = [line for line in drawn(final_panel(info), 60).splitlines() if "--m" in line or "your" in line]
    assert len(lines) == 2
    assert {len(line) - len(line.lstrip("│ ")) for line in lines} == {4}


def test_one_evaluation_is_one_value(history: list[Metric]) -> None:
    evals = [row for row in history if isinstance(row, EvalMetrics)]
    once = [row for row in history if row not in evals[1:]]
    text = drawn(final_panel(FinalInfo(summarise(once), Path("output/run"))), 80)
    line = next(line for line in text.splitlines() if "eval loss" in line)
    assert loss_text(evals[0].loss) in line
    assert "→" not in line
    assert "lowest" not in line


@pytest.mark.parametrize("width", [60, 80, 140])
def test_chinese_where_the_locale_is(
    width: int, startup: StartupInfo, history: list[Metric], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    start = joined(drawn(startup_panel(startup), width))
    for text in (
        "7.62B 参数中的 40.4M（0.53 %）", "训练数据", "12,345 行 · 4.32M 词元，其中 46 % 参与监督", "步数", "40 · 1 轮",
        "2 x 8 累积 x 4 进程 = 每步 64 行", "学习率 0.0001", "预计 17.9 GiB，共 79.1 GiB", "警告",
        "43 rows were dropped",
    ):  # fmt: skip
        assert text.replace(" ", "") in start, text
    final = joined(drawn(final_panel(FinalInfo(summarise(history), Path("out"))), width))
    for text in ("完成", "经过 40 步，损失下降了 78 %", "评估损失", "用时", "监督词元/秒", "进程内存峰值", "结果"):
        assert text.replace(" ", "") in final, text
