"""`deterministic: true`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pyralis.train.deterministic import ENVIRONMENT, deterministic
from pyralis.train.report.metric_rows import StepMetrics
from pyralis.train.report.metrics import read_metrics
from tests.train.runs import run


def state() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        *(os.environ.get(name) for name in ENVIRONMENT),
    )  # fmt: skip


def test_it_is_on_inside_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # what the user has chosen stays
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    before = state()
    with deterministic():
        assert state() == (True, False, True, False, False, ":16:8", "1")
    assert state() == before
    with pytest.raises(KeyError), deterministic():
        raise KeyError
    assert state() == before
    with deterministic(False):
        assert state() == before


@pytest.mark.parametrize("train_mode", ["lora", "full"])
def test_two_runs_agree_in_every_bit(tiny_llama: Path, chats: Path, tmp_path: Path, train_mode: str) -> None:
    before = state()
    for name in ("one", "other"):
        run(
            tiny_llama, chats, tmp_path / name, deterministic=True, train_mode=train_mode, lora_dropout=0.1,
            packing=True, logging_steps=1,
        )  # fmt: skip
    (name,) = {path.name for path in (tmp_path / "one").glob("*model.safetensors")}
    one, other = (load_file(tmp_path / run / name) for run in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    one_curve, other_curve = (
        [(m.loss, m.grad_norm) for m in read_metrics(tmp_path / run / "metrics.jsonl") if isinstance(m, StepMetrics)]
        for run in ("one", "other")
    )
    assert len(one_curve) == 4
    assert one_curve == other_curve
    assert state() == before
