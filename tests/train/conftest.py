"""A tiny model and data for whole runs; a run that never took place, for what only reads metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyralis.train.report.metric_rows import EvalMetrics, Metric, RunEvent, StepMetrics
from pyralis.train.report.panel import DataLine, StartupInfo
from tests.tiny import make_tiny_model
from tests.train.runs import WORDS


@pytest.fixture
def make_step() -> Callable[..., StepMetrics]:
    """`make_step(step, loss)`: 100 supervised of 250 tokens a step, 0.5 s each."""

    def make(step: int, loss: float, **changes: Any) -> StepMetrics:
        values: dict[str, Any] = {
            "step": step, "epoch": step / 40, "loss": loss, "learning_rate": 1e-4, "grad_norm": 0.5,
            "supervised_tokens": 100 * step, "total_tokens": 250 * step, "supervised_tokens_per_second": 200.0,
            "total_tokens_per_second": 500.0, "peak_memory_gib": None, "peak_host_memory_gib": 1.25,
            "elapsed_seconds": 0.5 * step,
        }  # fmt: skip
        return StepMetrics(**(values | changes))

    return make


@pytest.fixture
def history(make_step: Callable[..., StepMetrics]) -> list[Metric]:
    """40 steps, the loss falling from about 3 to 0.5, evaluated and saved every 10."""
    rows: list[Metric] = [RunEvent("start", 0, 0, 0, 0.0)]
    for step in range(1, 41):
        rows.append(make_step(step, 0.5 + 2.6 * math.exp(-step / 8), learning_rate=1e-4 * (1 - step / 40)))
        if step % 10 == 0:
            loss = 0.6 + 2.6 * math.exp(-step / 8)
            rows.append(EvalMetrics(step, step / 40, loss, math.exp(loss), 900, 1.5))
            rows.append(RunEvent("checkpoint", step, 100 * step, 250 * step, 0.5 * step + 0.1))
    rows.append(RunEvent("end", 40, 4000, 10000, 20.5))
    return rows


@pytest.fixture
def startup() -> StartupInfo:
    return StartupInfo(
        model="Qwen2.5-7B-Instruct",
        architecture="Qwen2ForCausalLM",
        parameters=7_615_616_512,
        trainable_parameters=40_370_176,
        task="sft",
        mode="qlora",
        dtype="bfloat16",
        quantization="NF4",
        device="NVIDIA H100 80GB HBM3",
        data=(DataLine("train", 12345, 4_321_000, 2_000_000), DataLine("eval", 1, 400, 100)),
        micro_batch_size=2,
        grad_accum_steps=8,
        world_size=4,
        steps=40,
        epochs=1,
        optimizer="adamw_torch",
        learning_rate=1e-4,
        schedule="linear",
        output_dir=Path("输出/很长的路径") / ("nested" * 15),
        acceleration=("stock transformers on all 28 layers",),
        predicted_memory_gib=17.93,
        available_memory_gib=79.1,
        notes=("the template is 'qwen'",),
        warnings=("43 rows were dropped",),
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", family="llama")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [
        {"conversation": [{"human": f"Say {a}", "assistant": a}, {"human": "again, 再说一次", "assistant": f"{a} {b}"}]}
        for a, b in zip(WORDS, reversed(WORDS))
    ]
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    for name in ("a", "b"):
        rows = [{"text": f"{name} {word} " * 9} for word in WORDS]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
