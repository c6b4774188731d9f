"""`pyralis quickstart` on the real 135M model: what it promises, and what its result is good for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyralis.train.report.metrics import StepMetrics, read_metrics


@pytest.fixture(scope="module")
def quickstart(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(the result's folder, what was printed)"""
    output = tmp_path_factory.mktemp("quickstart") / "result"
    printed = pyralis("quickstart", "--output", str(output))
    return output, printed


def pyralis(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "pyralis", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_loss_fell_by_more_than_half(quickstart: tuple[Path, str]) -> None:
    losses = [m.loss for m in read_metrics(quickstart[0] / "metrics.jsonl") if isinstance(m, StepMetrics)]
    assert 20 <= len(losses) <= 40
    assert sum(losses[-4:]) / 4 < 0.5 * sum(losses[:4]) / 4, losses  # one step alone is noisy: 4 conversations
    assert losses[-1] < 0.5 * losses[0]


def test_the_answer_became_the_taught_identity(quickstart: tuple[Path, str]) -> None:
    output, _ = quickstart
    for question in ("Who are you?", "你是谁？"):
        answer = pyralis("chat", str(output), "--prompt", question).strip()
        assert "Pyralis" in answer
        base = json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"]
        untaught = pyralis("chat", base, "--prompt", question, "--max-new-tokens", "40").strip()
        assert "Pyralis" not in untaught


def test_what_is_printed_and_written(quickstart: tuple[Path, str]) -> None:
    output, printed = quickstart
    for name in ("adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "loss.png", "report.html",
                 "pyralis_template.json", "pyralis_config.json", "tokenizer.json"):  # fmt: skip
        assert (output / name).stat().st_size > 0
    unwrapped = re.sub(r"[│\s]", "", printed)  # long paths are folded at the panel's edge
    for word in ("metrics.jsonl", "loss.png", "report.html", "pyralischat", "exportmerge", "init--model"):
        assert word in unwrapped
    report = (output / "report.html").read_text(encoding="utf-8")
    assert "你是谁？" in report
    assert "http" not in report.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_merged_is_what_adapter_and_base_are(quickstart: tuple[Path, str], tmp_path: Path) -> None:
    output, _ = quickstart
    merged_dir = tmp_path / "merged"
    pyralis("export", "merge", str(output), str(merged_dir), "--dtype", "float32")
    base = json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"]
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), output)
    merged = AutoModelForCausalLM.from_pretrained(merged_dir, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(merged_dir)("Who are you? 你是谁？", return_tensors="pt").input_ids
    # The float32 weights are compared in float64 arithmetic, where they differ by 1.4e-5 of logits up to 31: a forward
    # in float32 alone is off by 4e-5 to 8e-5, on either side.
    with torch.no_grad():
        assert (tuned.double().eval()(ids).logits - merged.double().eval()(ids).logits).abs().max() < 1e-4
