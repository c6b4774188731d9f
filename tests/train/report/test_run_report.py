"""The report: one file, nothing from outside, nothing of the user's run as code."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pyralis.data.preview import ShownRow, Stretch
from pyralis.train.report.environment import Environment, Gpu
from pyralis.train.report.memory_table import MemoryRow, MemoryTable
from pyralis.train.report.metric_rows import Metric, RunEvent, StepMetrics
from pyralis.train.report.panel import StartupInfo
from pyralis.train.report.reproduction import Reproduction
from pyralis.train.report.run_report import (
    DataSummary,
    DroppedRows,
    ReportInfo,
    SampleAnswer,
    render_report,
    write_report,
)
from pyralis.train.report.svg import LengthBin

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'</title></script>{{ 7 * 7 }}"
VOID = {"meta", "input", "br", "img", "link"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps what there is."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data


@pytest.fixture
def info(startup: StartupInfo, history: list[Metric]) -> ReportInfo:
    environment = Environment(
        python="3.12.1", platform="Linux", packages=(("torch", "2.13.0"),), cuda="13.0",
        gpus=(Gpu("NVIDIA H100", 79.1, (9, 0)),), cpu="AMD EPYC", cores=2, memory_gib=24.0,
    )  # fmt: skip
    return ReportInfo(
        startup=startup,
        metrics=history,
        config={"lora_rank": 64, "train_file": ["a.jsonl", "数据.jsonl"], "gradient_checkpointing": True},
        environment=environment,
        data=DataSummary(
            ("a.jsonl",),
            12400,
            12345,
            7,
            (DroppedRows("too long", 55, ("a.jsonl:3",)),),
            (LengthBin(0, 64, 9),),
            examples=(
                ShownRow(
                    "row 1: 9 tokens, 4 learnt",
                    (
                        Stretch("<s>", False, True),
                        Stretch("你是谁？", False),
                        Stretch("Lumen.", True),
                        Stretch("</s>", True, True),
                    ),
                ),
            ),
        ),
        memory=MemoryTable(
            (MemoryRow("weights", "权重", 5 << 30, 4 << 30, 0.5), MemoryRow("everything else", "其余", None, 3 << 30)),
            8 << 30,
            7 << 30,
            True,
            (MemoryRow("CUDA context", "CUDA 上下文", 560 << 20),),
            ("layers 0-27: all is kept",),
        ),
        reproduction=Reproduction(
            "pyralis train out/pyralis_config.json output_dir=NEW_FOLDER",
            42,
            "0123abcd",
            {"pyralis": "fedcba-dirty"},
            False,
        ),
        samples=(SampleAnswer("你是谁？", "an assistant", "Lumen"),),
        notes=("a note",),
    )


def test_everything_is_in_it(info: ReportInfo) -> None:
    text = Page(render_report(info)).text
    for part in (
        "Qwen2.5-7B-Instruct", "The loss fell by 78 % in 40 steps", "经过 40 步", "lora_rank",
        '["a.jsonl", "数据.jsonl"]', "true", "NVIDIA H100", "9.0", "torch 2.13.0", "你是谁？", "an assistant", "Lumen",
        "55: too long", "a.jsonl:3, …", "43 rows were dropped", "a note", "the template is 'qwen'", "Peak memory",
        "stock transformers on all 28 layers", "Effective config",
        "Qwen2.5-7B-Instruct was trained on 12,345 rows of answers, by qlora", "of 7.62B parameters, 40 steps",
        "在 12,345 行回答上以 qlora 训练", "9 tokens, 4 learnt", "Memory at the peak", "5.00 GiB", "everything else",
        "beside it: CUDA context", "560 MiB", "layers 0-27: all is kept", "How to do it again", "fedcba-dirty",
        "output_dir=NEW_FOLDER", "the same up to rounding",
    ):  # fmt: skip
        assert part in text, part


def test_what_is_learnt_is_marked(info: ReportInfo) -> None:
    html = render_report(info)
    assert '<span class="special">&lt;s&gt;</span><span>你是谁？</span><mark>Lumen.</mark>' in html
    assert '<mark class="special">&lt;/s&gt;</mark>' in html


def test_what_the_time_went_into(info: ReportInfo) -> None:
    last = info.metrics[-1]
    assert isinstance(last, RunEvent)
    parts = {"compute": 15.0, "data": 4.5, "saving": 0.5, "other": 0.0}
    timed = dataclasses.replace(info, metrics=[*info.metrics[:-1], dataclasses.replace(last, seconds_by_part=parts)])
    html = render_report(timed)
    rows = re.findall(
        r'"key c\d"></i>.*?lang="en">(.*?)</span>.*?<td class="right">(.*?)</td><td class="right">(.*?)</td>', html
    )
    assert rows == [
        ("forward and backward", "0:15", "75 %"), ("waiting for data", "4.5 s", "22 %"), ("saving", "0.5 s", "2.5 %"),
    ]  # fmt: skip
    assert "75 % of it in forward and backward" in html
    assert "by the CPU's clock" in Page(html).text


def test_what_comes_from_the_user_is_never_code(info: ReportInfo) -> None:
    attacked = ReportInfo(
        startup=dataclasses.replace(
            info.startup, model=ATTACK, device=ATTACK, optimizer=ATTACK, output_dir=Path(ATTACK),
            acceleration=(ATTACK,), notes=(ATTACK,), warnings=(ATTACK,), resumed_from=ATTACK, quantization=ATTACK,
        ),
        metrics=info.metrics,
        config={ATTACK: ATTACK, "list": [ATTACK]},
        environment=dataclasses.replace(info.environment, cpu=ATTACK, gpus=(Gpu(ATTACK, 1.0, (9, 0)),)),
        data=DataSummary(
            (ATTACK,), 1, 1, 0, (DroppedRows(ATTACK, 1, (ATTACK,)),),
            examples=(ShownRow(ATTACK, (Stretch(ATTACK, True), Stretch(ATTACK, False, True))),),
        ),
        memory=dataclasses.replace(info.memory, plan=(ATTACK,)),  # type: ignore[type-var]
        reproduction=Reproduction(ATTACK, 42, ATTACK, {ATTACK: ATTACK}, True),
        samples=(SampleAnswer(ATTACK, ATTACK, ATTACK),),
        notes=(ATTACK,),
        warnings=(ATTACK,),
        title=ATTACK,
    )  # fmt: skip
    plain, page = Page(render_report(info)), Page(render_report(attacked))
    assert len(page.scripts) == len(plain.scripts) == 2
    assert page.scripts[1] == plain.scripts[1]
    assert not {tag for tag, _ in page.tags} & {"img", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(ATTACK) >= 15


def test_nothing_is_fetched_and_only_our_script_may_run(info: ReportInfo) -> None:
    html = render_report(info)
    page = Page(html)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|src=|href=", html)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")) or ""
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_data_under_the_pointer_is_json(info: ReportInfo) -> None:
    curves = {curve["kind"]: curve for curve in json.loads(Page(render_report(info)).scripts[0])["curves"]}
    assert curves["raw"]["steps"] == curves["train"]["steps"] == list(range(1, 41))
    assert curves["eval"]["steps"] == [10, 20, 30, 40]


def test_both_languages_have_every_heading(info: ReportInfo) -> None:
    html = render_report(info)
    assert html.count('class="en"') == html.count('class="zh"') > 20
    for heading in re.findall(r"<h2>(.*?)</h2>", html):
        assert re.search(r'class="zh" lang="zh-Hans">[\u4e00-\u9fff]+', heading), heading


def test_what_there_is_not_is_left_out(info: ReportInfo, make_step: Callable[..., StepMetrics]) -> None:
    bare = dataclasses.replace(
        info,
        data=None,
        samples=(),
        notes=(),
        metrics=(),
        memory=None,
        reproduction=None,
        startup=dataclasses.replace(info.startup, notes=(), warnings=()),
    )
    text = Page(render_report(bare)).text
    for part in (
        "Answers before",
        "Notes",
        "Warnings",
        "Loss by step",
        "files",
        "None",
        "Evaluation loss",
        "went into",
        "Memory",
        "again",
    ):
        assert part not in text, part
    assert "No step was trained." in text
    Page(render_report(dataclasses.replace(bare, metrics=(make_step(1, float("nan")),))))


def test_it_is_written_whole(tmp_path: Path, info: ReportInfo) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(path, info)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert path.stat().st_size < 60_000
