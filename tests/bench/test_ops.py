"""The benchmarks themselves: that what is timed side by side computes the same. The timings need a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyralis.bench.case import BASE, COMPILED, PYRALIS, SHAPES, STOCK
from pyralis.bench.measure import Rates, Timing, require_gpu
from pyralis.bench.ops import Result, bench_ops, find_cases, op_names, table, write_json
from pyralis.bench.plot import plot_shares
from pyralis.errors import ConfigError, PyralisError

CASES = list(find_cases(op_names(), ["tiny"], [6]))
RATES = Rates("a GPU", 3e12, 7e14)
RESULT = Result(
    "op", "tiny", 4, "bfloat16", 3_000_000, 0, 1.0,
    {PYRALIS: Timing(2.0, 0.1, True), "torch": Timing(8.0, 0.1, False)}, {"liger": "RuntimeError: no"},
)  # fmt: skip


def tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [t for part in output if part is not None for t in tensors(part)] if isinstance(output, tuple) else []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_contenders_agree(case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # what it computes is torch's affair
    torch.manual_seed(0)
    contenders = case.contenders(torch.device("cpu"))
    assert PYRALIS in contenders
    assert case.bytes > 0
    ours = tensors(contenders.pop(PYRALIS)())
    assert ours
    for name, run in contenders.items():
        theirs = tensors(run())
        assert len(ours) == len(theirs), name
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a.float().reshape(b.shape), b.float(), rtol=0.05, atol=0.1, msg=name)


@pytest.mark.parametrize("op", ["copy_rows", "glu", "layer_norm", "rms_norm", "rope"])
def test_elementwise_ops_beside_torch_and_compile(op: str) -> None:
    for case in find_cases([op], ["tiny"], [6]):
        assert {PYRALIS, STOCK, COMPILED} <= set(case.contenders(torch.device("cpu"))), case.op


def test_share_of_the_roofline() -> None:
    assert RESULT.share() == 0.5
    assert RESULT.share("torch") == 0.125


def test_outputs(tmp_path: Path) -> None:
    write_json(tmp_path / "ops.json", [RESULT], RATES)
    record = json.loads((tmp_path / "ops.json").read_text())
    assert record["rates"]["gpu"] == "a GPU"
    assert record["results"][0]["timings"]["torch"]["microseconds"] == 8.0
    assert "torch" in record["versions"]
    plot_shares(tmp_path / "ops.png", [RESULT, RESULT], RATES)
    assert (tmp_path / "ops.png").read_bytes()[:4] == b"\x89PNG"
    columns = table([RESULT], RATES).columns
    assert [column.header for column in columns] == ["op", "shape", "tokens", "pyralis", "roofline %", "torch", "liger"]
    assert list(columns[-1].cells) == ["failed"]
    assert list(columns[-2].cells) == ["8.0*"]


def test_cost_on_top_of_the_base() -> None:
    timings = {name: Timing(time, 0.1, True) for name, time in (("pyralis", 108.0), (BASE, 100.0), ("torch", 150.0))}
    result = replace(RESULT, timings=timings)
    assert result.overhead(BASE) is None
    assert RESULT.overhead() is None
    cells = [list(column.cells) for column in table([result], RATES).columns]
    assert cells[3] == ["108.0 +8.0%"]
    assert cells[5:7] == [["100.0"], ["150.0 +50.0%"]]


def test_bad_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown op nonsense; expected one of .*rms_norm"):
        list(find_cases(["nonsense"], ["tiny"], [1]))
    with pytest.raises(ConfigError, match="unknown shape huge; expected one of llama3-8b"):
        list(find_cases(["rms_norm"], ["huge"], [1]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do without a GPU")
def test_needs_a_gpu() -> None:
    with pytest.raises(PyralisError, match="need a CUDA GPU"):
        require_gpu()


@pytest.mark.gpu
def test_measures(tmp_path: Path) -> None:
    results = bench_ops(["rms_norm"], ["tiny"], [64], tmp_path)
    assert SHAPES["tiny"].name == results[0].shape
    assert all(timing.microseconds > 0 for result in results for timing in result.timings.values())
    assert results[0].timings[PYRALIS].graphed
    assert (tmp_path / "ops.json").exists()
