"""`deterministic: true`."""

from __future__ import annotations

import os
import subprocess
import sys
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


# In a process of its own: cuBLAS reads its setting at the first product.
RESUMED = """
import sys
from pathlib import Path
from tests.train.runs import run

model, data, folder = map(Path, sys.argv[1:])
values = dict(
    deterministic=True, dtype="auto", lora_dropout=0.1, packing=True, logging_steps=1, save_steps=4, learning_rate=1e-3
)
run(model, data, folder / "whole", max_steps=12, **values)
run(model, data, folder / "first", max_steps=4, **values)
checkpoint = str(folder / "first" / "checkpoint-4")
run(model, data, folder / "parts", max_steps=12, resume_from_checkpoint=checkpoint, **values)
"""


@pytest.mark.gpu
def test_a_run_on_a_gpu_that_is_resumed_ends_in_the_same_bits(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    """Steps are recorded after the fourth in the whole run, and anew after it in the resumed one."""
    command = [sys.executable, "-c", RESUMED, str(tiny_llama), str(chats), str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, parts = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
