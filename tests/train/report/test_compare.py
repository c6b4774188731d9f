"""Runs beside each other: what is read, what differs, what is best, and what is no run."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from pyralis.errors import ConfigError, DataError
from pyralis.train.report.compare import FIGURES, Run, differences, read_runs
from pyralis.train.report.compare_chart import evaluation_chart, training_chart
from pyralis.train.report.compare_page import render_comparison, write_comparison
from pyralis.train.report.compare_table import comparison_tables
from pyralis.train.report.language import chinese_locale
from pyralis.train.report.metric_rows import EvalMetrics, Metric, StepMetrics, to_json
from tests.train.report.test_run_report import ATTACK, Page

CONFIG = {
    "model_name_or_path": "some/model",
    "lora_rank": 64,
    "packing": False,
    "train_file": ["a.jsonl", "数据.jsonl"],
}
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path, history: list[Metric]) -> MakeRun:
    def make(name: str, rows: list[Metric] | None = None, status: str = "finished", **settings: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(to_json(row) + "\n" for row in rows or history), encoding="utf-8")
        config = CONFIG | {"output_dir": str(folder)} | settings
        (folder / "pyralis_config.json").write_text(json.dumps(config), encoding="utf-8")
        record = {"status": status, "data_digest": "0123456789abcdef", "versions": {"torch": "2.13.0"}}
        (folder / "pyralis_run.json").write_text(json.dumps(record), encoding="utf-8")
        return folder

    return make


def figure(name: str, run: Run) -> str:
    return next(f for f in FIGURES if f.english == name).text(run)


def test_a_run_is_what_its_folder_says(make_run: MakeRun, history: list[Metric]) -> None:
    (run,) = read_runs([make_run("a")])
    assert (run.name, run.status, list(run.metrics)) == ("a", "finished", history)
    assert run.settings["data_digest"] == "0123456789ab"
    shown = {f.english: f.text(run) for f in FIGURES}
    assert shown == {
        "status": "finished", "steps": "40", "loss": "0.5175", "lowest loss": "0.5175", "eval loss": "0.6175",
        "lowest eval loss": "0.6175 @ 40", "tokens/s": "500", "supervised tokens/s": "200", "tokens": "10.0k",
        "peak memory": "1.25 GiB", "time": "0:20",
    }  # fmt: skip


def test_only_what_differs_is_shown(make_run: MakeRun) -> None:
    runs = read_runs([make_run("a"), make_run("b", lora_rank=8, max_steps=5), make_run("c")])
    found = {difference.name: difference.values for difference in differences(runs)}
    assert found == {"lora_rank": ("64", "8", "64"), "max_steps": ("-", "5", "-")}
    assert differences(read_runs([runs[0].folder, runs[2].folder])) == []


def test_versions_and_data_that_differ_come_last(make_run: MakeRun) -> None:
    a, b = make_run("a"), make_run("b", zoo=1)
    record = {"status": "running", "data_digest": "f" * 16, "versions": {"torch": "2.11.0"}}
    (b / "pyralis_run.json").write_text(json.dumps(record))
    runs = read_runs([a, b])
    assert [difference.name for difference in differences(runs)] == ["zoo", "data_digest", "versions.torch"]
    assert [run.status for run in runs] == ["finished", "unfinished"]


def test_a_run_that_a_nan_stopped_says_so(make_run: MakeRun) -> None:
    (run,) = read_runs([make_run("a", status="stopped")])
    assert figure("status", run) == "stopped"


def test_the_best_of_each_figure(make_run: MakeRun, make_step: Callable[..., StepMetrics]) -> None:
    rows = {name: [make_step(1, first), make_step(2, last)] for name, first, last in (("a", 1, 2), ("b", 3, 1.5))}
    rows["c"] = [make_step(1, 2.0), make_step(2, math.nan)]
    runs = read_runs([make_run(name, found) for name, found in rows.items()])
    best = {f.english: f.best(runs) for f in FIGURES}
    assert (best["loss"], best["lowest loss"]) == ({1}, {0})
    assert best["tokens/s"] == best["eval loss"] == best["steps"] == set()  # alike, not there, neither end is good
    assert figure("loss", runs[2]) == "nan"
    assert figure("eval loss", runs[0]) == figure("lowest eval loss", runs[0]) == "-"


def test_names_tell_runs_apart_and_a_run_comes_once(make_run: MakeRun) -> None:
    a, b = make_run("x/run"), make_run("y/run")
    assert [run.name for run in read_runs([a, b, a / "."])] == ["x/run", "y/run"]
    assert [run.name for run in read_runs([a])] == ["run"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nowhere", "nowhere does not exist; expected the output_dir"),
        ("a/metrics.jsonl", "metrics.jsonl is a file"),
        ("", r"holds no run .*There are runs inside of it: a\."),
        ("a/checkpoint-1", "Did you mean .*/a, the run that it belongs to"),
        ("empty", r"holds no run \(no metrics.jsonl in it\); expected the output_dir of a `pyralis train`\.$"),
    ],
)
def test_folders_that_are_no_runs(what: str, message: str, make_run: MakeRun, tmp_path: Path) -> None:
    (make_run("a") / "checkpoint-1").mkdir()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        read_runs([tmp_path / what])


def test_runs_that_cannot_be_read(make_run: MakeRun, history: list[Metric]) -> None:
    with pytest.raises(DataError, match="has not logged a step yet"):
        read_runs([make_run("a", history[:1])])
    (make_run("b") / "pyralis_config.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        read_runs([make_run("c"), make_run("b2").parent / "b"])
    bare = make_run("d")
    (bare / "pyralis_config.json").unlink()
    (bare / "pyralis_run.json").unlink()
    assert read_runs([bare])[0].status == "unfinished"


def test_curves_share_their_axes(make_run: MakeRun, make_step: Callable[..., StepMetrics]) -> None:
    short: list[Metric] = [make_step(1, 4.0), make_step(2, math.nan), make_step(3, 3.0), make_step(20, 2.0)]
    runs = read_runs([make_run("long"), make_run("short", short)])
    chart = training_chart(runs)
    paths = {path.get("class"): path.get("d") or "" for path in ElementTree.fromstring(chart.svg).iter("path")}
    ends = [float(re.findall(r"[ML]([\d.]+) ", paths[f"run r{i}"])[-1]) for i in (0, 1)]
    assert ends[1] < ends[0]
    assert paths["run r1"].count("M") == 2  # broken where the loss is not finite
    assert [curve["run"] for curve in chart.data["curves"]] == [0, 1]
    assert [v is None for v in chart.data["curves"][1]["values"]] == [False, True, False, False]
    evaluated = evaluation_chart(runs)
    assert evaluated is not None
    assert [curve["run"] for curve in evaluated.data["curves"]] == [0]
    assert len(list(ElementTree.fromstring(evaluated.svg).iter("circle"))) == 4
    assert evaluation_chart(runs[1:]) is None


def test_the_page_is_whole_and_offline(make_run: MakeRun, tmp_path: Path) -> None:
    runs = read_runs([make_run("a"), make_run("b", lora_rank=8)])
    write_comparison(tmp_path / "new" / "compare.html", runs)
    html = (tmp_path / "new" / "compare.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|src=|href=", html)
    for text in (
        "Runs compared",
        "训练对比",
        "Evaluation loss by step",
        "lora_rank",
        "0.6175 @ 40",
        "The loss fell by 78 %",
    ):
        assert text in page.text, text
    assert [len(curve["steps"]) for curve in json.loads(page.scripts[0])["curves"]] == [40, 40]
    assert "model_name_or_path" not in page.text


def test_nothing_of_a_run_becomes_code(make_run: MakeRun) -> None:
    attack = ATTACK.replace("/", "∕")  # a folder's name has no slash
    plain, attacked = (
        Page(render_comparison(read_runs([make_run(name), make_run(f"{name}2", system=text)])))
        for name, text in (("a", "x"), (attack, attack))
    )
    assert attacked.scripts[-1] == plain.scripts[-1]
    assert len(attacked.scripts) == len(plain.scripts)
    assert not {tag for tag, _ in attacked.tags} & {"img", "iframe", "object", "embed", "link", "base", "form"}
    assert attacked.text.count(attack) >= 4


def test_more_runs_than_colours(make_run: MakeRun, history: list[Metric]) -> None:
    only_training = [m for m in history if not isinstance(m, EvalMetrics)]
    html = render_comparison(read_runs([make_run(f"r{i}", only_training) for i in range(10)]))
    assert ".r9 { --run: var(--c1); --dash: 5 4; }" in html
    assert "Evaluation loss by step" not in html


@pytest.mark.parametrize(("width", "tables"), [(80, 3), (140, 2), (1000, 1)])
def test_tables_keep_to_the_width(width: int, tables: int, make_run: MakeRun) -> None:
    runs = read_runs([make_run(f"run-{i}", system="一句很长的系统提示 " * 5 + str(i)) for i in range(7)])
    found = list(comparison_tables(runs, width))
    assert len(found) == tables
    console = Console(file=io.StringIO(), width=width)
    for table in found:
        console.print(table)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(f"run-{i}" in output for i in range(7))
    assert output.count("supervised tokens/s") == tables
    assert "…" not in output


def test_chinese_where_the_locale_is(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    console = Console(file=io.StringIO(), width=80)
    for table in comparison_tables(read_runs([make_run("a"), make_run("b", status="interrupted")]), 80):
        console.print(table)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "最低评估损失" in output
    assert "已中断" in output


@pytest.mark.parametrize(
    ("environment", "chinese"),
    [
        ({}, False),
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, False),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW.UTF-8"}, True),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": ""}, True),
    ],
)
def test_the_locale(environment: dict[str, str], chinese: bool) -> None:
    assert chinese_locale(environment) is chinese
