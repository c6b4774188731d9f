"""SIGTERM in every phase of `pyralis train`: it exits with 75, "start me again", and then ends as one left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

# where each phase begins: (module, function or method) that is held up until the signal has come
PHASES = {
    "data": ("pyralis.train.run", "prepare_data"),
    "model": ("pyralis.train.run", "prepare_model"),
    "trainer": ("pyralis.train.run", "make_trainer"),
    "first step": ("pyralis.train.trainer", "PyralisTrainer.training_step"),
    "save": ("pyralis.train.trainer", "PyralisTrainer._write_checkpoint"),
    "evaluation": ("pyralis.train.trainer", "PyralisTrainer.evaluate"),
    "result": ("pyralis.train.run", "save_result"),
    "report": ("pyralis.train.run", "write_outcome"),
}
UNTRAINED = ("data", "model", "trainer")


def _held(module: str, name: str, marker: Path) -> None:
    """Have the first call write `marker` and wait until it is gone, or for a signal that raises."""
    import importlib

    place: Any = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        place = getattr(place, part)
    whole = getattr(place, last)

    def held(*args: Any, **kwargs: Any) -> Any:
        if os.environ.pop("HOLD", None):
            marker.touch()
            while marker.exists():
                time.sleep(0.01)
        return whole(*args, **kwargs)

    setattr(place, last, held)


def _command(config: str, log: str, phase: str | None) -> None:
    from pyralis.cli.main import main

    sys.stdout = sys.stderr = open(log, "w", encoding="utf-8")  # noqa: SIM115  to the end of the process
    if phase is not None:
        os.environ["HOLD"] = "1"
        _held(*PHASES[phase], Path(log).with_suffix(".held"))
    main(["train", config])


def start(config: Path, log: Path, phase: str | None = None) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyralis.train.run", "pyralis.cli.main"])
    process = context.Process(target=_command, args=(str(config), str(log), phase))
    process.start()
    return process


def signalled(config: Path, log: Path, phase: str, number: int = signal.SIGTERM) -> int:
    """The exit code of a run that gets the signal in that phase."""
    marker = log.with_suffix(".held")
    process = start(config, log, phase)
    while process.is_alive() and not marker.exists():
        time.sleep(0.01)
    os.kill(process.pid, number)
    time.sleep(0.1)
    marker.unlink(missing_ok=True)
    process.join(120)
    return int(process.exitcode)


@pytest.fixture
def config(tiny_llama: Path, chats: Path, tmp_path: Path) -> Path:
    values = {
        "model_name_or_path": str(tiny_llama), "train_file": str(chats), "output_dir": str(tmp_path / "out"),
        "max_seq_length": 96, "train_mode": "lora", "lora_rank": 4, "dtype": "float32", "max_steps": 4, "save_steps": 2,
        "eval_split": 0.2, "eval_strategy": "steps", "eval_steps": 2, "cache_dir": str(tmp_path / "cache"),
        "logging_steps": 1,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("phase", [p if p == "data" else pytest.param(p, marks=pytest.mark.full) for p in PHASES])
def test_sigterm(phase: str, config: Path, tmp_path: Path) -> None:
    log, output = tmp_path / "log.txt", tmp_path / "out"
    assert signalled(config, log, phase) == 75
    said = log.read_text()
    assert "Traceback" not in said
    if phase in UNTRAINED:
        assert "Stopped by SIGTERM. Nothing had been trained yet; the same command begins anew." in said
    else:
        assert list(output.glob("checkpoint-*"))
        assert "goes on from" in said or "The same command" in said or "resume" in said.lower()
    again = start(config, log)
    again.join(120)
    assert again.exitcode == 0, log.read_text()[-2000:]
    assert json.loads((output / "pyralis_run.json").read_text())["status"] == "finished"
    interrupted = load_file(output / "adapter_model.safetensors")
    config.write_text(config.read_text().replace(str(output), str(tmp_path / "whole")))
    whole = start(config, log)
    whole.join(120)
    expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert all(interrupted[name].equal(tensor) for name, tensor in expected.items())


def test_ctrl_c_before_training(config: Path, tmp_path: Path) -> None:
    assert signalled(config, tmp_path / "log.txt", "data", signal.SIGINT) == 130
    assert "Stopped by SIGINT. Nothing had been trained yet" in (tmp_path / "log.txt").read_text()


@pytest.mark.full
def test_a_second_run_is_refused_while_the_first_goes_on(config: Path, tmp_path: Path) -> None:
    log, second = tmp_path / "log.txt", tmp_path / "second.txt"
    first = start(config, log, "save")
    while first.is_alive() and not log.with_suffix(".held").exists():
        time.sleep(0.01)
    other = start(config, second)
    other.join(120)
    assert other.exitcode == 2
    assert "another run is writing into it" in " ".join(second.read_text().split())
    log.with_suffix(".held").unlink()
    first.join(120)
    assert first.exitcode == 0
