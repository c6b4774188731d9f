"""`pyralis train` with task_type: dpo: every mode, the reference, evaluation, resuming, what the report shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pyralis.errors import ConfigError, DataError
from pyralis.train.preference import dpo_run
from pyralis.train.preference.dpo_run import PreferenceTrainer
from pyralis.train.report.metric_rows import EvalMetrics, StepMetrics, read_metrics
from tests.train.runs import WORDS, run

DPO: dict[str, Any] = {"task_type": "dpo", "max_prompt_length": 48, "beta": 0.5, "logging_steps": 1}
# Full training in float32 needs a smaller rate than an adapter that begins with zeros.
MODES: dict[str, dict[str, Any]] = {
    "full": {"train_mode": "full", "learning_rate": 1e-3},
    "lora": {"train_mode": "lora", "lora_dropout": 0.05},
    "qlora": {"train_mode": "qlora", "lora_dropout": 0.05},
}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": "ignored",
            "chosen": [{"role": "user", "content": f"Say {a}"}, {"role": "assistant", "content": f"{a}!"}],
            "rejected": [{"role": "user", "content": f"Say {a}"}, {"role": "assistant", "content": f"No {b}."}],
        }
        for a, b in zip(WORDS, reversed(WORDS))
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def steps(folder: Path) -> list[StepMetrics]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if isinstance(row, StepMetrics)]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_to_prefer(mode: str, tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(tiny_llama, pairs, out, eval_split=0.25, max_steps=10, **DPO, **MODES[mode])
    rows = steps(out)
    assert rows[0].loss == pytest.approx(0.6931, abs=1e-3)  # the model is its own reference yet
    assert rows[0].reward_margin == pytest.approx(0, abs=1e-3)
    assert rows[-1].loss < 0.3
    assert rows[-1].reward_accuracy == 1
    *_, measured = [row for row in read_metrics(out / "metrics.jsonl") if isinstance(row, EvalMetrics)]
    assert measured.perplexity is None
    assert measured.reward_margin is not None
    assert measured.reward_margin > 0
    assert result.summary.rewards is not None
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Reward accuracy" in page
    assert "rewards by step" in page
    assert rows[-1].supervised_tokens > 0


def test_loss_is_a_mean_over_pairs_whatever_the_split(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    weights = []
    for name, batch, accumulated in (("a", 6, 1), ("b", 4, 2), ("c", 1, 6)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        if name == "b":  # 4 + 2: the micro-batches differ
            options["max_samples"] = 6
        run(
            tiny_llama, pairs, tmp_path / name, max_steps=1, max_grad_norm=0.0, optim="sgd",
            **{"max_samples": 6, **DPO, **options},
        )  # fmt: skip
        weights.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    for other in weights[1:]:
        for key, value in weights[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-7)


def test_reference_is_kept_and_found_again(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was computed before is read, and gives the same run; other weights are computed anew."""
    options = {**DPO, **MODES["full"], "max_steps": 2}
    run(tiny_llama, pairs, tmp_path / "a", **options)
    parts = sorted((tmp_path / "cache" / "references").rglob("*.npy"))
    assert [np.load(part).shape for part in parts] == [(12, 2)]
    calls: list[int] = []
    computed = PreferenceTrainer._reference_logps

    def counted(self: PreferenceTrainer, batch: Any) -> torch.Tensor:
        calls.append(1)
        return computed(self, batch)

    monkeypatch.setattr(PreferenceTrainer, "_reference_logps", counted)
    run(tiny_llama, pairs, tmp_path / "b", **options)
    assert not calls
    assert [row.loss for row in steps(tmp_path / "a")] == [row.loss for row in steps(tmp_path / "b")]
    parts[0].write_bytes(b"half of a file")
    run(tiny_llama, pairs, tmp_path / "c", **options)
    assert len(calls) == 2  # 12 rows by 8
    run(tmp_path / "a", pairs, tmp_path / "d", **options)
    assert len(calls) == 4


def test_precomputed_and_computed_give_the_same_run(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    for name, beforehand in (("a", False), ("b", True)):
        run(tiny_llama, pairs, tmp_path / name, eval_split=0.25, precompute_ref_log_probs=beforehand, **DPO)
    for mine, theirs in zip(steps(tmp_path / "a"), steps(tmp_path / "b")):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert mine.reward_margin == pytest.approx(theirs.reward_margin, rel=1e-3, abs=1e-5)


def test_an_adapter_that_goes_on_is_held_to_what_it_was(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    run(tiny_llama, pairs, tmp_path / "first", **DPO, max_steps=6)
    run(tiny_llama, pairs, tmp_path / "more", **DPO, load_adapter=str(tmp_path / "first"))
    rows = steps(tmp_path / "more")
    assert rows[0].reward_margin == pytest.approx(0, abs=1e-4)
    assert "computed first: the adapter goes on from what it was" in (tmp_path / "more" / "report.html").read_text()


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_resuming_goes_on_as_if_uninterrupted(mode: str, tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    options = {**DPO, **MODES[mode], "save_strategy": "steps", "save_steps": 2}
    run(tiny_llama, pairs, tmp_path / "whole", max_steps=4, **options)
    run(tiny_llama, pairs, tmp_path / "cut", max_steps=4, **options)
    for name in ("checkpoint-4",):
        (tmp_path / "cut" / name).rename(tmp_path / name)
    run_file = tmp_path / "cut" / "pyralis_run.json"
    record = json.loads(run_file.read_text()) | {"status": "running"}
    run_file.write_text(json.dumps(record))
    run(tiny_llama, pairs, tmp_path / "cut", max_steps=4, **options)
    whole, cut = steps(tmp_path / "whole"), steps(tmp_path / "cut")
    assert [row.step for row in cut] == [1, 2, 3, 4]
    assert [row.loss for row in cut] == pytest.approx([row.loss for row in whole], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({"loss_type": "ipo"}, 1.0),
        pytest.param({"loss_type": "hinge"}, 1.0, marks=pytest.mark.full),
        pytest.param({"loss_type": "cdpo", "label_smoothing": 0.1}, 0.6931, marks=pytest.mark.full),
    ],
)
def test_other_losses(options: dict[str, Any], loss: float, tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    run(tiny_llama, pairs, tmp_path / "out", **DPO, **options, max_steps=3)
    assert steps(tmp_path / "out")[0].loss == pytest.approx(loss, abs=1e-3)
    run(tiny_llama, pairs, tmp_path / "rpo", **DPO, **options, rpo_alpha=0.5, max_steps=3)
    assert steps(tmp_path / "rpo")[0].loss > loss + 1  # half of about 5.8 nats a token


def test_stock_layers_give_the_same_losses(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    for name, acceleration in (("fast", "on"), ("stock", "off")):
        run(tiny_llama, pairs, tmp_path / name, **DPO, acceleration=acceleration)
    fast, stock = steps(tmp_path / "fast"), steps(tmp_path / "stock")
    assert [row.loss for row in fast] == pytest.approx([row.loss for row in stock], rel=1e-4)


def test_a_sharded_model_is_waited_for(
    tiny_llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values are computed when training begins, and give the same run."""
    options = {**DPO, **MODES["full"]}
    run(tiny_llama, pairs, tmp_path / "a", **options)

    def waits(self: PreferenceTrainer, progress: Any = None) -> None:
        self.add_callback(dpo_run._AtTheBeginning(self))

    monkeypatch.setattr(PreferenceTrainer, "prepare_reference", waits)
    run(tiny_llama, pairs, tmp_path / "b", **options)
    assert [row.loss for row in steps(tmp_path / "a")] == [row.loss for row in steps(tmp_path / "b")]
    with pytest.raises(ConfigError, match="not in the cache any more"):
        dpo_run._missing({})


def test_rows_that_are_no_pairs_are_named(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"chats.jsonl:1: task_type dpo needs preference rows"):
        run(tiny_llama, chats, tmp_path / "out", **DPO)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "robust", "label_smoothing": 0.6}, "expected less than 0.5"),
        ({"loss_type": "exo_pair"}, "needs label_smoothing"),
        ({"loss_type": "sigmoyd"}, "loss_type"),
    ],
)
def test_losses_are_checked_first(options: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tiny_llama, tmp_path / "missing.jsonl", tmp_path / "out", **DPO, **options)


@pytest.mark.full
def test_a_real_model_learns_to_prefer(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M on the sample pairs: rewards part, and pairs that were held out follow."""
    data = Path(__file__).parents[3] / "data/sample_dpo.jsonl"
    values: dict[str, Any] = {
        **DPO, "beta": 0.1, "max_seq_length": 256, "lora_rank": 8, "lora_alpha": 16, "learning_rate": 1e-4,
        "per_device_train_batch_size": 4, "max_steps": 16, "eval_split": 0.2, "eval_strategy": "steps", "eval_steps": 8,
    }  # fmt: skip
    result = run(smollm2, data, tmp_path / "out", **values)
    rows = steps(tmp_path / "out")
    assert rows[0].loss == pytest.approx(0.6931, abs=1e-3)
    assert sum(row.reward_accuracy or 0 for row in rows[-4:]) / 4 > 0.9
    assert rows[-1].reward_margin is not None
    assert rows[-1].reward_margin > 0.25  # measured: 0.41
    assert result.summary.rewards is not None
    assert result.summary.rewards.evaluated
    assert result.summary.rewards.last_accuracy > 0.7
