"""Processes: what peers tell is kept as they tell it, and what becomes of those that crash or run late."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pyralis.bench.train.results import Record, Run
from pyralis.bench.train.run import _process, _run_peer, measure
from pyralis.bench.train.settings import MadeModel, ModelFacts, PeerChoice, Shape, TrainBench, parse_peers
from pyralis.bench.train.worker import OUT_OF_MEMORY, _said
from pyralis.cli.main import build_app
from pyralis.errors import ConfigError, PyralisError
from tests.bench.train.stub_peers import write_stubs

FACTS = ModelFacts(1, 1, 1, 1, 512, "float32")
UNSLOTH = PeerChoice("unsloth", ("False",))


def bench(*peers: PeerChoice) -> TrainBench:
    return TrainBench("tiny", "qlora", (Shape(1, 16),), peers, rank=4, steps=2, warmup=1)


def stubbed(folder: Path, monkeypatch: pytest.MonkeyPatch, **stubs: str) -> None:
    write_stubs(folder, **stubs)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)


def run_stub(stub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deadline: float | None = None) -> str:
    stubbed(tmp_path / "site", monkeypatch, unsloth=stub)
    (tmp_path / "logs").mkdir()
    record = Record(bench(UNSLOTH), FACTS, None, {})
    made = MadeModel(tmp_path, False, (), "sdpa", "cpu", FACTS)
    return _run_peer(record.bench, made, UNSLOTH, tmp_path, deadline, record, lambda _: None, lambda _: None)


def test_a_peer_that_crashes_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run_stub("raise ImportError('no such GPU')", tmp_path, monkeypatch)
    assert said == "ended with status 1: ImportError: no such GPU"


def test_want_of_memory_is_known_from_any_library() -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")):
        assert _said(error) == OUT_OF_MEMORY
    assert _said(RuntimeError("no\nreason")) == "RuntimeError: reason"


def test_a_peer_that_runs_late_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    assert run_stub("import time; time.sleep(60)", tmp_path, monkeypatch, time.time() + 1) == "not run: the time was up"
    assert time.monotonic() - begin < 20


def test_a_process_ends_with_its_block(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), _process("worker", ["nothing"], tmp_path, tmp_path / "log") as process:
        raise KeyboardInterrupt
    assert process.poll() is not None


def test_a_model_that_cannot_be_made(tmp_path: Path) -> None:
    unknown = TrainBench("llama-9", "qlora", (Shape(1, 16),), ())
    with pytest.raises(ConfigError, match="'llama-9' is neither one of"):
        measure(unknown, tmp_path, lambda _: None, None, lambda _: None)


def test_no_time_for_the_model(tmp_path: Path) -> None:
    with pytest.raises(PyralisError, match="over before the model was made"):
        measure(bench(), tmp_path, lambda _: None, 1, lambda _: None)


def test_the_command_refuses_what_it_does_not_know() -> None:
    result = CliRunner().invoke(build_app(), ["bench", "train", "--peers", "nobody"])
    assert isinstance(result.exception, ConfigError)


@pytest.mark.full
def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every runner in its process, Unsloth and Liger as stand-ins; one peer that is not installed."""
    stubbed(tmp_path / "site", monkeypatch)
    arguments = ["bench", "train", "--model", "tiny", "--peers", "hf,hf-trl,liger,unsloth", "--shapes", "1x16,2x24"]
    arguments += ["--loop", "bare,trainer", "--steps", "2", "--warmup", "3", "--rank", "4"]
    arguments += ["--work-dir", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(build_app(), arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record = Record.read(tmp_path / "out" / "train-tiny-qlora.json")
    assert (tmp_path / "out" / "train-tiny-qlora.png").is_file()
    assert [run.error for run in record.runs if run.error] == []
    names = {run.case.peer for run in record.runs}
    assert names == {"pyralis", "hf", "hf-trl", "liger", "unsloth"}
    assert len(record.runs) == sum(len(choice.variants) * 4 for choice in record.bench.peers) - 2  # hf-trl: one loop
    expected = _losses(record.runs, "hf", "bare")
    for name in names:
        found = _losses(record.runs, name, "trainer")
        assert found == pytest.approx(expected, abs=2e-3), name
    assert {loaded.peer for loaded in record.loaded} == names


def _losses(runs: list[Run], peer: str, loop: str) -> tuple[float, ...]:
    found = [run for run in runs if (run.case.peer, run.case.loop) == (peer, loop)]
    assert found
    assert found[0].measured is not None
    return found[0].measured.losses


@pytest.mark.full
def test_a_peer_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubbed(tmp_path / "site", monkeypatch, unsloth="import os; os._exit(3)")
    monkeypatch.setattr("pyralis.bench.train.run.find_spec", lambda name: None if name == "liger_kernel" else name)
    written: list[int] = []
    choices = parse_peers("unsloth,liger,hf", ["hf=False"], "qlora")
    record = measure(bench(*choices), tmp_path, lambda record: written.append(len(record.runs)), None, lambda _: None)
    errors = {run.case.peer: run.error for run in record.runs}
    assert errors["unsloth"] == "ended with status 3: it said nothing"
    assert errors["liger"] == "liger_kernel is not installed"
    assert errors["hf"] is None
    assert written[-1] == len(record.runs) == 2 + 2 + 1
    assert written == sorted(written)
