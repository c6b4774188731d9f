"""Whole runs from recorded steps, which a CPU records on tape, against the same runs without."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from pyralis.engine import step_graphs
from pyralis.engine.optimizer import FlatAdamW
from pyralis.models.causal_lm import causal_lm_of, causal_state
from pyralis.models.surgery import accelerate
from pyralis.ops.attention_backends import BACKENDS
from pyralis.train import lean
from pyralis.train.arguments import PyralisTrainingArguments
from pyralis.train.flat_optimizer import flat_optimizer
from pyralis.train.trainer import PyralisTrainer
from tests.engine.faults import Wrong
from tests.engine.steps import make
from tests.engine.tape import TapeRecorder
from tests.tiny import build_tiny_model
from tests.train.runs import run


class Counting(TapeRecorder):
    """replays: of forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        replay = super().record(work)

        def counted() -> None:
            self.replays += 1
            replay()

        return counted


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Counting:
    made = Counting()
    monkeypatch.setattr(step_graphs, "recorder_for", lambda device: made)
    monkeypatch.setitem(BACKENDS, "flash_cpu", BACKENDS["math"])  # which reads no bounds of packed rows
    return made


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def equal(got: Path, want: Path) -> None:
    ours, theirs = weights(got), weights(want)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 2e-4 * value.norm(), name


@pytest.mark.parametrize(
    "values",
    [
        {"gradient_accumulation_steps": 2},
        {"packing": True, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
        {"gradient_checkpointing": True, "max_grad_norm": 0.1},
        {"eval_split": 0.25, "eval_strategy": "steps", "eval_steps": 2, "modules_to_save": ["lm_head"]},
        {
            "eval_split": 0.25,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
            "load_best_model_at_end": True,
        },
    ],
    ids=["accumulated", "packed", "checkpointed", "evaluated", "best"],
)
def test_a_run(recorder: Counting, values: dict[str, Any], tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    for mode in ("off", "auto"):
        run(tiny_llama, chats, tmp_path / mode, cuda_graph=mode, max_steps=8, **values)
        assert (recorder.replays > 6) is (mode == "auto")
    equal(tmp_path / "auto", tmp_path / "off")
    assert "recorded steps checked" in (tmp_path / "auto" / "report.html").read_text()
    losses = [
        [
            row["loss"]
            for row in map(json.loads, (tmp_path / mode / "metrics.jsonl").read_text().splitlines())
            if "loss" in row
        ]
        for mode in ("auto", "off")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_that_is_resumed(recorder: Counting, tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    run(tiny_llama, chats, tmp_path / "whole", cuda_graph="off", max_steps=8, save_steps=4)
    run(tiny_llama, chats, tmp_path / "first", max_steps=4, save_steps=4)
    before, checkpoint = recorder.replays, str(tmp_path / "first" / "checkpoint-4")
    run(tiny_llama, chats, tmp_path / "parts", max_steps=8, resume_from_checkpoint=checkpoint)
    assert recorder.replays > before > 0
    equal(tmp_path / "parts", tmp_path / "whole")


def tuned() -> Any:
    torch.manual_seed(3)
    model: Any = get_peft_model(
        build_tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    accelerate(model)
    return model


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(4, 300, (20 + 3 * i,), generator=generator).tolist() for i in range(12)]
    return [{"input_ids": ids, "labels": [-100] * 4 + ids[4:]} for ids in made]


def collated(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(e["input_ids"]) for e in examples)
    filler = {"input_ids": 0, "labels": -100}
    batch = {k: torch.tensor([e[k] + [v] * (longest - len(e[k])) for e in examples]) for k, v in filler.items()}
    return {
        **batch,
        "attention_mask": (torch.arange(longest) < torch.tensor([[len(e["labels"])] for e in examples])) * 1,
    }


def trained(model: Any, folder: Path, **values: Any) -> PyralisTrainer:
    settings: dict[str, Any] = {
        "max_steps": 6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 1,
    }  # fmt: skip
    arguments = PyralisTrainingArguments(str(folder), **settings | values)
    trainer = PyralisTrainer(model, arguments, collated, train_dataset=rows())
    trainer.train()
    return trainer


def test_the_flat_optimizer_reads_gradients_where_steps_leave_them(
    recorder: Counting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a GPU: recorded steps, their gradients in the optimizer's buffer, clipped in its step."""
    monkeypatch.setattr(lean, "flat_optimizer", lambda *a, **k: flat_optimizer(*a, **k, gpu_only=False))
    models = tuned(), tuned()
    for model, mode in zip(models, ("off", "auto")):
        trainer = trained(model, tmp_path / mode, cuda_graph=mode, max_grad_norm=0.5)
        flat = trainer._flat_optimizer
        assert isinstance(flat, FlatAdamW)
        views = {view.data_ptr() for view in flat.grad_views}
        assert all(
            view.untyped_storage().data_ptr() == flat.grads.untyped_storage().data_ptr() for view in flat.grad_views
        )
        assert len(views) == len(flat.parameters)
    assert recorder.replays > 6
    for a, b in zip(models[1].parameters(), models[0].parameters()):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_memory_runs_short_in_a_backward(recorder: Counting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beside recorded steps: these are given up, and the micro-batch is computed again, gradients and all."""
    models, failed = (tuned(), tuned()), []
    backward = torch.Tensor.backward

    def cramped(self: Tensor, *args: Any, **kwargs: Any) -> None:
        backward(self, *args, **kwargs)
        if recorder.replays > 4 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError

    trained(models[0], tmp_path / "off", cuda_graph="off")
    monkeypatch.setattr(torch.Tensor, "backward", cramped)
    trained(models[1], tmp_path / "auto")
    assert failed
    for a, b in zip(models[1].parameters(), models[0].parameters()):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_a_run_whose_recorded_steps_are_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is found before the first of them counts; the run is that without them."""
    models = tuned(), tuned()
    spoilt = next(p for name, p in models[1].named_parameters() if "layers.1.mlp.down_proj.lora_A" in name)

    @torch.no_grad()
    def fault() -> None:
        assert spoilt.grad is not None
        spoilt.grad.mul_(2)

    monkeypatch.setattr(step_graphs, "recorder_for", lambda device: Wrong(1, fault))
    trainers = [trained(model, tmp_path / mode, cuda_graph=mode) for model, mode in zip(models, ("off", "auto"))]
    for a, b in zip(models[1].parameters(), models[0].parameters()):
        assert (a - b).norm() <= 1e-4 * b.norm()
    assert trainers[0].step_graphs_summary is None
    assert "0 micro-steps replayed" in str(trainers[1].step_graphs_summary)
    assert "given up: a recorded step is not what it is" in str(trainers[1].step_graphs_summary)


def test_an_engine_chosen_by_hand_stays(recorder: Counting, tmp_path: Path) -> None:
    model = tuned()
    engine = step_graphs.use_step_graphs(model)
    trained(model, tmp_path)
    assert causal_state(causal_lm_of(model)).engine is engine
    assert recorder.replays > 0
    step_graphs.use_step_graphs(model, "off")
    trained(model, tmp_path, cuda_graph="off")
    assert causal_state(causal_lm_of(model)).engine is None


def test_what_is_not_recorded_is_said_once(
    recorder: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tuned()
    causal_lm_of(model).model.norm.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    with caplog.at_level(logging.WARNING, logger="pyralis"):
        trained(model, tmp_path)
    assert recorder.replays == 0
    (said,) = [r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()]
    assert "a hook" in said


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_run_on_a_gpu(dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Accumulated, clipped, in fp16 under a GradScaler; the flat optimizer reads gradients where graphs leave them."""
    engines: list[step_graphs.StepGraphs] = []
    use = step_graphs.use_step_graphs
    monkeypatch.setattr(step_graphs, "use_step_graphs", lambda *a, **k: engines.append(use(*a, **k)) or engines[-1])
    losses = []
    for mode in ("off", "auto"):
        model = make(torch.device("cuda"), dtype=torch.bfloat16 if dtype == "bf16" else torch.float16)
        trainer = trained(
            model, tmp_path / mode, cuda_graph=mode, use_cpu=False, max_steps=12, logging_steps=1, learning_rate=1e-3,
            max_grad_norm=0.5, **{dtype: True},
        )  # fmt: skip
        assert trainer._flat_optimizer is not None
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert max(0 if engine is None else engine.replays for engine in engines) >= 4
