"""What is made of measurements: verdicts, records, tables, the picture and the page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console

from pyralis.bench import page
from pyralis.bench.measure import Rates
from pyralis.bench.train.clock import Measured
from pyralis.bench.train.command import faults
from pyralis.bench.train.losses import differs, excess, reference_of
from pyralis.bench.train.plot import plot_steps
from pyralis.bench.train.results import Loaded, Record, Run
from pyralis.bench.train.settings import Case, Loop, ModelFacts, PeerChoice, Shape, TrainBench
from pyralis.bench.train.tables import loading_lines, loss_table, markdown_table, speed_table

SHAPE = Shape(2, 1000)
RIGHT = (11.0, 10.9, 10.8)


def run(
    peer: str, variant: str = "True", loss: tuple[float, ...] = RIGHT, ms: float = 100.0, loop: Loop = "bare"
) -> Run:
    seconds = (ms * 1e-3, ms * 2e-3, ms * 1e-3)
    measured = Measured(seconds, seconds, loss, 2.0, 3 * 2**30, 4 * 2**30, 1234, 0.05)
    return Run(Case(peer, variant, loop, SHAPE), measured)


def record(*runs: Run) -> Record:
    bench = TrainBench("tiny", "qlora", (SHAPE,), (PeerChoice("pyralis", ("keep",)),), profile=True)
    facts = ModelFacts(1_000_000, 10_000, 128, 2, 512, "bfloat16")
    return Record(
        bench, facts, Rates("a GPU", 3e12, 7e14), {"torch": "2"}, list(runs), [Loaded("hf", "True", 9.0, 3.0)]
    )


def test_excess() -> None:
    assert excess(RIGHT, RIGHT) == 0
    assert excess((11.002, 10.9, 10.8), RIGHT) == pytest.approx(1)
    assert excess((11.0, 10.907, 10.8), RIGHT) == pytest.approx(1)  # 0.002 + 5 % of the 0.1 that were learnt
    assert excess((11.0, 10.9, float("nan")), RIGHT) == float("inf")
    assert excess((), ()) == excess(RIGHT[:2], RIGHT) == float("inf")


def test_the_reference_is_hugging_faces_nearest_run() -> None:
    kbit, plain, trainer = run("hf", "True+kbit"), run("hf"), run("hf", loop="trainer")
    ours = run("pyralis", "keep")
    runs = [ours, run("hf-trl", loop="trainer"), kbit, trainer, plain]
    assert reference_of(ours, runs) is plain
    assert reference_of(ours, [kbit, trainer]) is kbit
    assert reference_of(run("hf-trl", loop="trainer"), runs) is trainer
    assert reference_of(ours, [run("liger")]) is None
    assert reference_of(ours, [Run(plain.case, error="out of memory")]) is None


def test_verdicts() -> None:
    ours, off = run("pyralis", "keep"), run("pyralis", "offload_input", (11.01, 10.9, 10.8))
    assert differs(ours, [run("hf")]) is False
    assert differs(off, [run("hf")]) is True
    assert differs(ours, []) is None
    assert faults(record(ours, run("hf"), run("unsloth", loss=(12.0, 11.0, 10.0)))) == []
    assert faults(record(ours, off, run("hf"))) == [
        "pyralis offload_input, bare loop, 2x1000: the first losses are not Hugging Face's"
    ]


@pytest.mark.parametrize(
    ("error", "ours_to_mend"),
    [("out of memory", False), ("not run: the time was up", False), ("RuntimeError: no", True)],
)
def test_errors_of_ours(error: str, ours_to_mend: bool) -> None:
    case = Case("pyralis", "keep", "bare", SHAPE)
    assert bool(faults(record(Run(case, error=error)))) is ours_to_mend
    assert faults(record(Run(dataclasses.replace(case, peer="hf"), error=error))) == []


def test_dropout_is_not_compared() -> None:
    kept = record(run("pyralis", "keep", (9.0, 9.0, 9.0)), run("hf"))
    kept.bench = dataclasses.replace(kept.bench, dropout=0.1)
    assert faults(kept) == []
    assert "NO" not in markdown_table(kept)


def test_a_record_comes_back(tmp_path: Path) -> None:
    kept = record(run("pyralis", "keep"), Run(Case("hf", "True", "bare", SHAPE), error="out of memory"))
    kept.write(tmp_path / "train.json")
    again = Record.read(tmp_path / "train.json")
    assert vars(again) == vars(kept)
    assert json.loads((tmp_path / "train.json").read_text())["kind"] == "train"


def test_flops_and_utilisation() -> None:
    kept = record()
    attention = 6 * 2 * 1000**2 * 128 * 2
    assert kept.flops(SHAPE) == 2000 * (4 * 1_000_000 + 6 * 10_000) + attention
    kept.bench = dataclasses.replace(kept.bench, mode="full")
    assert kept.flops(SHAPE) == 2000 * 6 * 1_000_000 + attention
    one = run("pyralis")
    assert one.tokens_per_second == pytest.approx(20_000)
    assert kept.utilisation(one) == pytest.approx(kept.flops(SHAPE) / 0.1 / 7e14)


def test_tables(tmp_path: Path) -> None:
    kept = record(
        run("hf", ms=300), run("pyralis", "keep"), run("liger", loss=(11.3, 11.2, 11.1), ms=200),
        Run(Case("unsloth", "False", "bare", SHAPE), error="ValueError: no"),
    )  # fmt: skip
    text = markdown_table(kept)
    assert text.endswith("\n\nunsloth (False bare 2x1000): ValueError: no")
    lines = [line.split(" | ") for line in text.splitlines()[4:8]]
    assert [line[1] for line in lines] == ["pyralis", "liger", "hf", "unsloth"]  # the quickest first
    assert lines[0][:7] == ["| 2x1000", "pyralis", "keep", "100.0", "100.0", "20000", "0%"]
    assert lines[0][7:] == ["3.00", "4.00", "1234", "50.0", "11.0000 10.9000 10.8000", "yes |"]
    assert [line[-1] for line in lines] == ["yes |", "NO |", "reference |", "- |"]
    assert loading_lines(kept) == ["hf True: imported in 9.0 s, loaded in 3.0 s, first step 2.0 s"]


def test_a_terminal_of_100_columns_shows_all_of_it(tmp_path: Path) -> None:
    kept = record(run("hf", "True+kbit", ms=1034.5), run("pyralis", "offload_input"))
    with (tmp_path / "table.txt").open("w") as file:
        console = Console(width=100, record=True, file=file)
        console.print(speed_table(kept), loss_table(kept))
        text = console.export_text()
    assert "matmul 700 TFLOP/s" in text
    assert "…" not in text


@pytest.mark.parametrize("rates", [True, False])
def test_the_picture(rates: bool, tmp_path: Path) -> None:
    kept = record(run("hf"), run("pyralis", "keep"), Run(Case("liger", "True", "bare", SHAPE), error="no"))
    kept.rates = kept.rates if rates else None
    plot_steps(tmp_path / "train.png", kept)
    assert (tmp_path / "train.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*.part"))


def test_the_page_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = record(run("pyralis", "keep"), run("hf"))
    kept.write(tmp_path / "train-tiny.json")
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    text = page.renewed("before\n<!-- table: train-tiny.json -->\nold\n<!-- end -->\nbehind\n")
    assert markdown_table(kept) in text
    assert "old" not in text
    assert page.renewed(text) == text
