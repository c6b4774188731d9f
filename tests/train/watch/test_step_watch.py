"""Losses and gradients that are not finite: stopped at, or left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyralis.errors import NotFiniteError
from pyralis.train.checkpoints.checkpoint import list_checkpoints, run_status
from pyralis.train.report.metric_rows import RunEvent, StepMetrics
from pyralis.train.report.metrics import read_metrics
from pyralis.train.trainer import PyralisTrainer
from pyralis.train.watch.nan_record import read_step
from pyralis.train.watch.step_watch import StepWatch
from pyralis.train.watch.watched_trainer import WatchedTrainer
from tests.train.poison import BAD, make_poisoned_model, make_rows
from tests.train.runs import run


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    return make_poisoned_model(tmp_path / "poisoned")


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[int], Path]:
    """`rows(n)`: a file of 8 conversations; the first n have the bad letter."""
    return partial(make_rows, tmp_path)


def events(output: Path, *names: str) -> list[RunEvent]:
    return [m for m in read_metrics(output / "metrics.jsonl") if isinstance(m, RunEvent) and m.event in names]


WAYS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "whole, torch's optimizer": {"train_mode": "full"},
    "whole, the flat optimizer": {"train_mode": "full", "dtype": "bfloat16", "bf16": True},
    "in the backward": {"train_mode": "full", "dtype": "bfloat16", "bf16": True, "optimizer_in_bwd": True},
    "no clipping": {"max_grad_norm": 0.0},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_stop_names_the_row(poisoned: Path, rows: Callable[[int], Path], tmp_path: Path, way: str) -> None:
    output = tmp_path / "out"
    settings = {"max_steps": 4, "save_steps": 1, "save_strategy": "steps", "logging_steps": 5, "learning_rate": 1e-3}
    with pytest.raises(NotFiniteError) as caught:
        run(poisoned, rows(1), output, **(settings | WAYS[way]))
    message = str(caught.value)
    assert caught.value.exit_code == 1
    (folder,) = output.glob("nan-step-*")
    saved, batches, weights = read_step(folder)
    assert message.startswith(f"step {saved.step}: the loss is nan")
    assert f"{BAD}0" in saved.rows(most=2)
    assert f"pyralis replay {folder}" in message
    assert len(batches) == WAYS[way].get("gradient_accumulation_steps", 1)
    assert {"input_ids", "labels", "attention_mask"} <= batches[0].keys()
    assert bool(weights) == ("train_mode" not in WAYS[way])
    if way != "in the backward":
        assert saved.parameters
        assert saved.parameters[0] in message
    # every step before was saved, that one was not, and what was saved is whole
    assert [step for step, _ in list_checkpoints(output)] == list(range(1, saved.step))
    assert saved.checkpoint == (f"checkpoint-{saved.step - 1}" if saved.step > 1 else None)
    for _, checkpoint in list_checkpoints(output):
        for path in checkpoint.glob("*.safetensors"):
            assert all(bool(t.isfinite().all()) for k, t in load_file(path).items() if "embed_tokens" not in k)
    assert run_status(output) == "stopped"
    assert [event.step for event in events(output, "nan")] == [saved.step]
    assert f"Stopped at step {saved.step}" in (output / "report.html").read_text()


def test_the_row_is_found_in_the_prepared_data(poisoned: Path, rows: Callable[[int], Path], tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"row 0, "):
        run(poisoned, rows(1), tmp_path / "out", max_steps=4)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "in the backward"])
def test_skip_leaves_the_step_out(poisoned: Path, rows: Callable[[int], Path], tmp_path: Path, way: str) -> None:
    output = tmp_path / "out"
    result = run(poisoned, rows(2), output, max_steps=4, logging_steps=1, on_nan="skip", **WAYS[way])
    skipped = events(output, "skipped")
    assert 1 <= len(skipped) <= 2
    assert len(result.summary.skipped) == len(skipped)
    assert all(BAD in event.message for event in skipped)
    assert result.status == "finished"
    assert result.summary.verdict.mood != "bad"
    assert not list(output.glob("nan-step-*"))
    for path in output.glob("*.safetensors"):
        assert all(bool(t.isfinite().all()) for k, t in load_file(path).items() if "embed_tokens" not in k)
    losses = {m.step: m.loss for m in read_metrics(output / "metrics.jsonl") if isinstance(m, StepMetrics)}
    first = skipped[0].step
    if WAYS[way].get("gradient_accumulation_steps", 1) == 1 and first > 1:
        assert losses[first] == losses[first - 1]


def test_more_than_ten_in_a_row_stop(poisoned: Path, rows: Callable[[int], Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(NotFiniteError, match=r"^11 steps in a row; the last of them, step 11: "):
        run(poisoned, rows(8), output, max_steps=20, on_nan="skip")
    assert [event.step for event in events(output, "skipped")] == list(range(1, 11))


def test_a_rate_far_too_high(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(NotFiniteError, match="no checkpoint had been saved"):
        run(tiny_llama, chats, output, learning_rate=1e30, max_steps=8, save_strategy="no")
    (folder,) = output.glob("nan-step-*")
    saved, _, weights = read_step(folder)
    assert saved.step > 1
    assert max(float(t.abs().max()) for t in weights.values()) > 1e29  # the weights that it was computed with


def test_a_run_goes_on_from_the_checkpoint_before(poisoned: Path, rows: Callable[[int], Path], tmp_path: Path) -> None:
    output, settings = tmp_path / "out", {"max_steps": 4, "save_steps": 1, "save_strategy": "steps"}
    with pytest.raises(NotFiniteError):
        run(poisoned, rows(1), output, **settings)
    result = run(poisoned, rows(1), output, **settings, on_nan="skip")
    assert result.status == "finished"
    assert result.summary.skipped
    run(poisoned, rows(0), output, **settings, overwrite_output_dir=True)
    assert not list(output.glob("nan-step-*"))


def test_the_first_step_may_be_left_out(poisoned: Path, rows: Callable[[int], Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings = {"max_steps": 4, "logging_steps": 1, "train_sampling_strategy": "sequential"}
    result = run(poisoned, rows(1), output, on_nan="skip", **settings)
    assert [event.step for event in result.summary.skipped] == [1]
    assert not events(output, "nan")
    assert "The loss" in result.summary.verdict.english
    assert "not usable" not in result.summary.verdict.english


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: flags are read a step late."""
    monkeypatch.setattr(StepWatch, "_reads_late", staticmethod(lambda flag: True))


LATE: dict[str, dict[str, Any]] = {
    "flat": {"dtype": "bfloat16", "bf16": True, "learning_rate": 1e-3},
    "fused": {"learning_rate": 1e-3},
}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's fused AdamW in place of the plain one, which a CPU gets otherwise."""
    plain = PyralisTrainer.create_optimizer

    def create(self: PyralisTrainer, model: Any = None) -> torch.optim.Optimizer:
        optimizer = plain(self, model)
        if type(optimizer) is torch.optim.AdamW:
            groups = [{"params": group["params"]} for group in optimizer.param_groups]
            self.optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
        assert self.optimizer is not None
        return self.optimizer

    monkeypatch.setattr(PyralisTrainer, "create_optimizer", create)


@pytest.mark.usefixtures("late", "fused")
@pytest.mark.parametrize("way", LATE)
def test_read_late_the_weights_are_safe(
    poisoned: Path, rows: Callable[[int], Path], tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step after the bad one has been launched when that is found out; both leave the weights as they were."""
    kept: list[dict[str, torch.Tensor]] = []

    def keep(self: PyralisTrainer, step: Any, in_a_row: str = "") -> str:
        model: Any = self.model
        kept.append({name: p.detach().clone() for name, p in model.named_parameters()})
        assert self.state.global_step == step.number  # the one behind it is being taken
        return WatchedTrainer.save_bad_step(self, step, in_a_row)

    monkeypatch.setattr(PyralisTrainer, "save_bad_step", keep)
    settings = {"train_mode": "full", "train_sampling_strategy": "sequential", "save_strategy": "no", **LATE[way]}
    path = rows(3)  # rows 0, 1 and 2
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[3:] + lines[:3]))  # the bad ones last: steps 3 and 4
    with pytest.raises(NotFiniteError, match="step 3: the loss is nan"):
        run(poisoned, path, tmp_path / "out", max_steps=4, logging_steps=100, **settings)
    run(poisoned, path, tmp_path / "short", max_steps=2, **settings)
    short = load_file(tmp_path / "short" / "model.safetensors")
    assert all(torch.equal(kept[0][name], short[name].to(kept[0][name].dtype)) for name in short)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("way", LATE)
def test_read_late_the_same_steps_are_left_out(
    poisoned: Path, rows: Callable[[int], Path], tmp_path: Path, way: str, request: pytest.FixtureRequest
) -> None:
    settings = {"train_mode": "full", "max_steps": 4, "save_strategy": "no", "on_nan": "skip", **LATE[way]}
    run(poisoned, rows(1), tmp_path / "at once", **settings)
    request.getfixturevalue("late")
    run(poisoned, rows(1), tmp_path / "late", **settings)
    assert events(tmp_path / "at once", "skipped")
    (skipped,), (late,) = (events(tmp_path / name, "skipped") for name in ("at once", "late"))
    assert (skipped.step, skipped.message) == (late.step, late.message)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("at once", "late"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("late")
def test_a_checkpoint_waits_for_the_flag(poisoned: Path, rows: Callable[[int], Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(NotFiniteError):
        run(poisoned, rows(1), output, max_steps=4, save_strategy="steps", save_steps=1, logging_steps=100)
    (folder,) = output.glob("nan-step-*")
    assert [step for step, _ in list_checkpoints(output)] == list(range(1, read_step(folder)[0].step))


@pytest.mark.parametrize(("scale", "counts"), [(65536.0, False), (1.0, False), (0.5, True), (None, True)])
def test_overflow_under_a_loss_scale_is_no_nan(scale: float | None, counts: bool) -> None:
    scaler = None if scale is None else SimpleNamespace(_scale=torch.tensor(scale))
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler), optimizer=None)
    watch = StepWatch(trainer, "stop", lambda *_: None)
    assert bool(watch._counts(torch.tensor(True))) is counts


def test_weights_and_curve_do_not_change_by_watching(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    for mode in ("stop", "skip"):
        run(tiny_llama, chats, tmp_path / mode, on_nan=mode, logging_steps=1)
    one, other = (load_file(tmp_path / mode / "adapter_model.safetensors") for mode in ("stop", "skip"))
    assert all(torch.equal(one[name], other[name]) for name in one)
