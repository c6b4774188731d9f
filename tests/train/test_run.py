"""Whole runs on tiny models: tasks x modes, what lies in the folder afterwards, stopping, resuming, refusing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyralis.errors import ConfigError, PyralisError
from pyralis.train.checkpoints.checkpoint import list_checkpoints, run_status
from pyralis.train.report.metrics import EvalMetrics, RunEvent, StepMetrics, read_metrics
from pyralis.train.run import train
from tests.train.runs import quiet, run


@pytest.mark.parametrize(
    ("task", "mode"),
    [
        ("sft", "full"),
        ("sft", "lora"),
        ("sft", "qlora"),
        ("pretrain", "full"),
        ("pretrain", "lora"),
        ("pretrain", "qlora"),
    ],
)
def test_tasks_and_modes(task: str, mode: str, tiny_llama: Path, chats: Path, documents: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    data = chats if task == "sft" else documents
    result = run(tiny_llama, data, output, task_type=task, train_mode=mode, max_steps=8, eval_split=0.2, save_steps=4)
    assert result.status == "finished"
    assert run_status(output) == "finished"
    assert result.summary.last_loss < result.summary.first_loss
    assert result.summary.last_eval_loss is not None

    names = {path.name for path in output.iterdir()}
    expected = {"metrics.jsonl", "loss.png", "report.html", "pyralis_config.json", "pyralis_run.json", "tokenizer.json"}
    expected |= (
        {"config.json", "model.safetensors"} if mode == "full" else {"adapter_config.json", "adapter_model.safetensors"}
    )
    expected |= {"pyralis_template.json"} if task == "sft" else set()
    assert expected <= names, expected - names
    assert "training_args.bin" not in names
    assert not [name for name in names if name.startswith(".")]

    metrics = read_metrics(output / "metrics.jsonl")
    steps = [m for m in metrics if isinstance(m, StepMetrics)]
    assert steps[0].step == 1  # the first and the last step are there although logging_steps is 10
    assert steps[-1].step == 8
    assert steps[-1].supervised_tokens > 0
    assert [m for m in metrics if isinstance(m, EvalMetrics)]
    assert [m.event for m in metrics if isinstance(m, RunEvent)] == ["start", "checkpoint", "checkpoint", "end"]

    # the saved config runs the same again
    again = json.loads((output / "pyralis_config.json").read_text())
    second = train(again | {"output_dir": str(tmp_path / "again")}, console=quiet())
    assert second.summary.last_loss == pytest.approx(result.summary.last_loss, rel=1e-6)


def test_the_adapter_is_what_stock_peft_loads(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(tiny_llama, chats, output)
    weights = load_file(output / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 7  # A and B, 2 layers, 7 linear layers; the head has none
    assert not [name for name in weights if "lm_head" in name]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(output)
    tuned = PeftModel.from_pretrained(base, output)
    chat = [{"role": "user", "content": "Say red"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with tuned.disable_adapter():
        before = tuned(ids).logits
    assert not torch.allclose(before, tuned(ids).logits)


def test_a_named_template_travels_with_the_result(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(tiny_llama, chats, output, template_name="vicuna", system="Be brief.")
    assert json.loads((output / "pyralis_template.json").read_text())["name"] == "vicuna"
    text = AutoTokenizer.from_pretrained(output).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert "USER: Hi" in text


def test_sample_questions_are_answered_before_and_after(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    result = run(
        tiny_llama, chats, tmp_path / "out", sample_prompts=["Say <b>red</b>"], sample_max_new_tokens=5, max_steps=20
    )
    (sample,) = result.samples
    assert sample.before != sample.after
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Say &lt;b&gt;red" in page


def test_resuming_after_a_kill_ends_at_the_same_weights(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a run; the same command goes on and ends as an undisturbed run does."""
    config = {
        "model_name_or_path": str(tiny_llama), "train_file": str(chats), "max_seq_length": 96, "train_mode": "lora",
        "lora_rank": 4, "lora_dropout": 0.1, "dtype": "float32", "max_steps": 60, "save_steps": 3, "logging_steps": 1,
        "per_device_train_batch_size": 2, "learning_rate": 1e-3, "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    file = tmp_path / "config.json"
    output = tmp_path / "killed"
    file.write_text(json.dumps(config | {"output_dir": str(output)}))
    command = [sys.executable, "-m", "pyralis", "train", str(file)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list_checkpoints(output):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert run_status(output) == "running"
    killed_at = list_checkpoints(output)[-1][0]
    assert killed_at < 60

    resumed = train(file, console=quiet())
    straight = train(config | {"output_dir": str(tmp_path / "straight")}, console=quiet())
    a, b = (load_file(r.output_dir / "adapter_model.safetensors") for r in (resumed, straight))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    logged = [m.step for m in read_metrics(output / "metrics.jsonl") if isinstance(m, StepMetrics)]
    assert logged == list(range(1, 61))
    assert resumed.summary.supervised_tokens == straight.summary.supervised_tokens


def test_ctrl_c_saves_a_checkpoint_and_exits(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model_name_or_path: {tiny_llama}\ntrain_file: {chats}\noutput_dir: {output}\nmax_seq_length: 96\n"
        "train_mode: lora\nlora_rank: 4\ndtype: float32\nmax_steps: 100000\nper_device_train_batch_size: 1\n"
        f"logging_steps: 1\ncache_dir: {tmp_path / 'cache'}\n"
    )
    command = [sys.executable, "-m", "pyralis", "train", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while not ((output / "metrics.jsonl").exists() and '"train"' in (output / "metrics.jsonl").read_text()):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert run_status(output) == "interrupted"
    (checkpoint,) = list_checkpoints(output)
    events = [m for m in read_metrics(output / "metrics.jsonl") if isinstance(m, RunEvent)]
    assert events[-1].event == "interrupted"
    assert events[-1].step == checkpoint[0]
    assert "the same command again" in printed


def test_a_finished_run_is_not_overwritten(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    run(tiny_llama, chats, tmp_path / "out", max_steps=1)
    with pytest.raises(ConfigError, match="overwrite_output_dir"):
        run(tiny_llama, chats, tmp_path / "out", max_steps=1)
    assert run(tiny_llama, chats, tmp_path / "out", max_steps=2, overwrite_output_dir=True).summary.steps == 2


def test_what_is_wrong_with_the_data_is_said_before_a_model_is_loaded(
    tiny_llama: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyralis.train.run.prepare_model", lambda *_: pytest.fail("the model was loaded"))
    chats.write_text(chats.read_text() + '\n{"conversation": 3}\n')
    with pytest.raises(PyralisError, match=r"chats\.jsonl:13"):
        run(tiny_llama, chats, tmp_path / "out")
    chats.write_text(json.dumps({"conversation": [{"human": "x" * 500, "assistant": "y"}]}))
    with pytest.raises(PyralisError, match="max_seq_length"):
        run(tiny_llama, chats, tmp_path / "out", max_seq_length=16)
    assert not (tmp_path / "out").exists()


def test_firefly_launcher_does_the_same(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    """Firefly's own field names, its paged optimizer, fp16 and tensorboard, on a machine without a GPU."""
    config = {
        "output_dir": str(tmp_path / "out"), "model_name_or_path": str(tiny_llama), "train_file": str(chats),
        "template_name": "qwen", "num_train_epochs": 1, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16, "learning_rate": 2e-4, "max_seq_length": 128, "logging_steps": 100,
        "save_steps": 100, "save_total_limit": 1, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 100,
        "lora_rank": 64, "lora_alpha": 16, "lora_dropout": 0.05, "use_unsloth": True, "gradient_checkpointing": True,
        "disable_tqdm": False, "optim": "paged_adamw_32bit", "seed": 42, "fp16": True, "report_to": "tensorboard",
        "dataloader_num_workers": 0, "save_strategy": "steps", "weight_decay": 0, "max_grad_norm": 0.3,
        "remove_unused_columns": False, "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    file = tmp_path / "llama3-8b-sft-qlora.json"
    file.write_text(json.dumps(config))
    launcher = Path(__file__).parents[2] / "train.py"
    environment = {**os.environ, "PYTHONPATH": str(launcher.parent / "src")}
    done = subprocess.run(
        [sys.executable, str(launcher), "--train_args_file", str(file), "--local_rank=0"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    logged = [m for m in read_metrics(tmp_path / "out" / "metrics.jsonl") if isinstance(m, StepMetrics)]
    assert [m.step for m in logged] == [1]  # 12 rows, 16 accumulated: one step, and it is logged
    assert "Traceback" not in done.stderr
