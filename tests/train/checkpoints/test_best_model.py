"""Runs that go by the evaluation loss: the best model is the result, and a run stops when the loss no longer falls."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pyralis.errors import ConfigError
from pyralis.train.config.train_config import config_from_dict
from pyralis.train.interrupt import StopCallback
from pyralis.train.report.metric_rows import EvalMetrics, RunEvent, SampledAnswers, read_metrics
from tests.train.runs import run

# so high a learning rate that the evaluation loss rises in between; only the last step is one that save_steps saves
UNSTEADY: dict[str, Any] = {
    "eval_split": 0.25, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 12, "learning_rate": 0.1,
    "save_steps": 12,
}  # fmt: skip
WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}
every_mode = pytest.mark.parametrize("mode", ["lora", "full"])


def evaluations(output: Path) -> dict[int, float]:
    return {m.step: m.loss for m in read_metrics(output / "metrics.jsonl") if isinstance(m, EvalMetrics)}


def best_of(output: Path) -> int:
    losses = evaluations(output)
    return min(losses, key=lambda step: losses[step])


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a scheduler's SIGTERM in that step does it."""
    original = StopCallback.on_step_end

    def on_step_end(self: StopCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.stop.requested = "SIGTERM" if state.global_step == step else None
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopCallback, "on_step_end", on_step_end)


def events(output: Path, name: str) -> list[RunEvent]:
    return [m for m in read_metrics(output / "metrics.jsonl") if isinstance(m, RunEvent) and m.event == name]


@every_mode
def test_the_best_model_is_the_result(mode: str, tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    output, weights = tmp_path / "out", WEIGHTS[mode]
    values = UNSTEADY | {"train_mode": mode}
    result = run(tiny_llama, chats, output, load_best_model_at_end=True, save_total_limit=1, **values)
    best = best_of(output)
    assert best < 12
    assert result.summary.best_eval_step == best
    saved = (output / weights).read_bytes()
    assert saved == (output / f"checkpoint-{best}" / weights).read_bytes()
    assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{best}"]
    note = f"the result is the model of step {best}, whose evaluation loss was the lowest"
    assert note in (output / "report.html").read_text(encoding="utf-8")

    last = tmp_path / "last"
    run(tiny_llama, chats, last, **values)
    assert evaluations(last) == evaluations(output)
    assert (last / weights).read_bytes() != saved
    assert "the result is the model of step" not in (last / "report.html").read_text(encoding="utf-8")


@every_mode
def test_early_stopping_resumed_ends_as_one_left_alone(
    mode: str, tiny_llama: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = UNSTEADY | {
        "train_mode": mode, "load_best_model_at_end": True, "early_stopping_patience": 2, "save_total_limit": 1,
    }  # fmt: skip
    alone = tmp_path / "alone"
    result = run(tiny_llama, chats, alone, **values)
    best, last = best_of(alone), result.summary.steps
    assert best + 2 == last < 12
    (event,) = events(alone, "stopped_early")
    assert (event.step, event.message) == (last, "2 evaluations in a row did not bring the loss below its lowest")
    assert f"Stopped early at step {last}: 2 evaluations" in result.summary.verdict.english
    assert json.loads((alone / "pyralis_run.json").read_text())["status"] == "finished"

    output = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        stop_at(last - 1, patch)  # after the first of the two
        assert run(tiny_llama, chats, output, **values).status == "interrupted"
    assert {path.name for path in output.glob("checkpoint-*")} == {f"checkpoint-{best}", f"checkpoint-{last - 1}"}
    assert run(tiny_llama, chats, output, **values).summary.steps == last
    assert evaluations(output) == evaluations(alone)
    assert (output / WEIGHTS[mode]).read_bytes() == (alone / WEIGHTS[mode]).read_bytes()


def test_a_threshold_asks_for_more(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    result = run(
        tiny_llama, chats, tmp_path / "out", early_stopping_patience=1, early_stopping_threshold=9.0, **UNSTEADY
    )
    assert result.summary.steps == 2
    (event,) = events(tmp_path / "out", "stopped_early")
    assert event.message == "the last evaluation did not bring the loss below its lowest by more than 9"


def test_a_damaged_best_checkpoint_is_not_the_result(
    tiny_llama: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pyralis.train.checkpoints.best_model.damage", lambda path: "a byte is wrong")
    with caplog.at_level(logging.WARNING, "pyralis"):
        run(tiny_llama, chats, tmp_path / "out", load_best_model_at_end=True, **UNSTEADY)
    assert "is damaged (a byte is wrong): the result is the last model instead" in caplog.text
    weights = WEIGHTS["lora"]
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "out/checkpoint-12" / weights).read_bytes()


def test_the_sample_questions_at_each_evaluation(
    tiny_llama: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = ["Say <b>red</b>", "Say blue"]
    asked = {"sample_prompts": questions, "sample_at_eval": True, "sample_max_new_tokens": 5}
    values = UNSTEADY | asked | {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "learning_rate": 0.01}
    output = tmp_path / "out"
    result = run(tiny_llama, chats, output, **values)
    taken = [m for m in read_metrics(output / "metrics.jsonl") if isinstance(m, SampledAnswers)]
    assert [(m.step, list(m.answers)) for m in taken] == [(2, questions), (4, questions)]
    for sample in result.samples:
        assert sample.during == [(m.step, m.answers[sample.question]) for m in taken]
        assert sample.during[-1] == (4, sample.after)  # nothing was trained behind the last evaluation
    report = (output / "report.html").read_text(encoding="utf-8")
    assert report.count("at the evaluations") == 2
    assert "step 4</span>" in report

    # answering changes nothing of the training, and a resumed run has the answers before its interruption too
    silent, resumed = tmp_path / "silent", tmp_path / "resumed"
    run(tiny_llama, chats, silent, **values | {"sample_at_eval": False})
    assert evaluations(silent) == evaluations(output)
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        run(tiny_llama, chats, resumed, **values)
    again = run(tiny_llama, chats, resumed, **values)
    assert again.samples == result.samples


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"early_stopping_patience": 2}, "early_stopping_patience: 2 counts evaluations, and there are none"),
        ({"early_stopping_patience": 0}, "early_stopping_patience: 0 is not allowed"),
        ({"early_stopping_threshold": -1}, "early_stopping_threshold: -1 is not allowed"),
    ],
)
def test_what_cannot_be_followed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"model_name_or_path": "m", "train_file": "x", "max_seq_length": 8} | values)


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"early_stopping_threshold": 0.1}, "early_stopping_threshold: has no effect: early_stopping_patience is not"),
        ({"early_stopping_patience": 2, "eval_split": 0.1}, "the result is the last model, which is past the best one"),
        ({"sample_at_eval": True}, "sample_at_eval: has no effect: there are no sample_prompts"),
        ({"sample_at_eval": True, "sample_prompts": ["x"]}, "sample_at_eval: has no effect: nothing is evaluated"),
        ({"eval_fraction": 0.1}, "eval_fraction"),
        ({"early_stopping_steps": 3, "eval_split": 0.1}, "early_stopping_steps"),
    ],
)
def test_what_is_said(values: dict[str, Any], note: str) -> None:
    loaded = config_from_dict({"model_name_or_path": "m", "train_file": "x", "max_seq_length": 8} | values)
    assert [text for text in loaded.notes if note in text]
    if "eval_fraction" in values:
        assert loaded.config.eval_split == 0.1
    if "early_stopping_steps" in values:
        assert loaded.config.early_stopping_patience == 3
