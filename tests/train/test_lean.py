"""LeanTrainer: the same run as Trainer's for a fraction of the CPU time."""

from __future__ import annotations

import copy
import inspect
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from pyralis.data.collate import Collator
from pyralis.train.lean import LEAN_METHODS, LeanTrainer
from pyralis.train.module_walk import all_training, parameters_of
from tests.tiny import build_tiny_model


def lora_model(layers: int = 2) -> Any:
    model = build_tiny_model("llama", num_hidden_layers=layers)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def rows(count: int) -> Dataset:
    ids = [[4 + (7 * i + j) % 300 for j in range(6 + i % 5)] for i in range(count)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def make(cls: type[Trainer], folder: Path, model: Any, *callbacks: TrainerCallback, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "no", "learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_grad_norm": 0.3, "dataloader_pin_memory": False,
    }  # fmt: skip
    args = TrainingArguments(**defaults | settings)
    return cls(model=model, args=args, train_dataset=rows(32), data_collator=Collator(0), callbacks=[*callbacks])


def history(trainer: Any) -> list[dict[str, Any]]:
    left_out = ("runtime", "per_second")
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in left_out)}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.0}, {"weight_decay": 0.1, "logging_steps": 2}])
def test_a_run_is_that_of_trainer(tmp_path: Path, settings: dict[str, Any]) -> None:
    models = [lora_model(), lora_model()]
    stock, lean = (make(cls, tmp_path, m, **settings) for cls, m in zip((Trainer, LeanTrainer), models))
    stock.train()
    lean.train()
    assert history(lean) == history(stock)
    assert history(stock)[-1]["total_flos"] > 0
    for ours, theirs in zip(models[1].parameters(), models[0].parameters()):
        assert torch.equal(ours, theirs)


def test_one_process_takes_one_of_several_gpus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Trainer would copy the model in each step, or multiply the batch."""
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=2, dataloader_pin_memory=False
    )
    assert args.n_gpu == 0
    args._n_gpu = 3
    trainer = LeanTrainer(lora_model(), args, train_dataset=rows(8), data_collator=Collator(0))
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == 2
    assert "3 GPUs are visible" in caplog.text


class Spent(TrainerCallback):
    """CPU milliseconds of this thread per micro-step, in each optimizer step."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []
        self.before = time.thread_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.thread_time()
        self.milliseconds.append((now - self.before) / args.gradient_accumulation_steps * 1e3)
        self.before = now


def without_model(cls: type[Trainer]) -> type[Trainer]:
    """The trainer alone: its loss touches one parameter, and all have gradients of zero."""

    class Alone(cls):  # type: ignore[valid-type, misc]
        zeros: list[tuple[nn.Parameter, torch.Tensor]] | None = None

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.zeros is None:
                self.zeros = [(p, torch.zeros_like(p)) for p in model.parameters() if p.requires_grad]
            if self.zeros[0][0].grad is None:
                for parameter, zero in self.zeros:
                    parameter.grad = zero
            return self.zeros[0][0].sum() * 0

    return Alone


def test_a_micro_step_costs_little_cpu(tmp_path: Path) -> None:
    model, spent = lora_model(32), {}
    for cls in (Trainer, LeanTrainer):
        clock = Spent()
        settings = {"max_steps": 8, "logging_steps": 100, "gradient_accumulation_steps": 4}
        make(without_model(cls), tmp_path, model, clock, **settings).train()
        spent[cls.__name__] = min(clock.milliseconds[2:])  # the others were disturbed by other processes
    assert spent["LeanTrainer"] < 8, f"{spent}; on an idle machine it is 1.5"
    assert spent["LeanTrainer"] < spent["Trainer"] / 2.5, spent


class Disturb(TrainerCallback):
    """Switches a module deep inside to evaluation, copies the model, thaws a parameter."""

    def __init__(self) -> None:
        self.modes: list[bool] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.deep = model.get_base_model().model.layers[1].mlp
        self.deep.register_forward_pre_hook(lambda module, _: self.modes.append(module.training))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.deep.eval()
        copied = copy.deepcopy(model)
        copied.eval()
        assert model.training
        assert not copied.training
        copied.train()
        assert all_training(copied)
        assert not self.deep.training
        model.get_base_model().lm_head.weight.requires_grad_(True)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.thawed = model.get_base_model().lm_head.weight.grad is not None

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        assert not state.global_step or model.get_base_model().lm_head.weight.grad is not None


def test_what_others_do_to_the_model_is_noticed(tmp_path: Path) -> None:
    stock, lean = (make(cls, tmp_path, lora_model(), Disturb()) for cls in (Trainer, LeanTrainer))
    for trainer in (stock, lean):
        trainer.train()
        disturb = trainer.callback_handler.callbacks[-2]
        assert isinstance(disturb, Disturb)
        assert disturb.modes == [True] * 6
        assert disturb.thawed
        assert trainer.model.get_base_model().lm_head.weight.grad is None
    assert history(lean) == history(stock)


@pytest.mark.parametrize("filtered", [True, False])
def test_a_nan_is_left_out_of_the_mean_or_shown_as_by_trainer(tmp_path: Path, filtered: bool) -> None:
    def broken(cls: type[Trainer]) -> type[Trainer]:
        class Broken(cls):  # type: ignore[valid-type, misc]
            seen = 0

            def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
                self.seen += 1
                loss = super().compute_loss(*args, **kwargs)
                return loss * (torch.nan if self.seen == 3 else torch.inf if self.seen == 6 else 1)

        return Broken

    settings = {"logging_nan_inf_filter": filtered, "logging_steps": 2, "learning_rate": 0.0, "max_steps": 4}
    trainers = [make(broken(cls), tmp_path, lora_model(), **settings) for cls in (Trainer, LeanTrainer)]
    for trainer in trainers:
        trainer.train()
        assert trainer.args.logging_nan_inf_filter is filtered
    losses = [[entry["loss"] for entry in history(t) if "loss" in entry] for t in trainers]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6, nan_ok=True)
    assert all(loss == loss for loss in losses[0]) is filtered


def test_nothing_stays_on_the_model(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model = lora_model()
    trainer = make(LeanTrainer, tmp_path, model, Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not LEAN_METHODS.keys() & vars(model).keys()
    assert trainer.args.logging_nan_inf_filter


def test_walks_see_what_torch_sees() -> None:
    model = lora_model()
    assert list(map(id, parameters_of(model))) == list(map(id, model.parameters()))
    model.train()
    assert all_training(model)
    model.get_base_model().model.layers[1].self_attn.q_proj.lora_A["default"].eval()
    assert not all_training(model)
    tied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    tied["b"].weight = tied["a"].weight
    assert len(parameters_of(tied)) == 3


def test_what_is_overridden_and_read_of_trainer_is_as_it_was() -> None:
    def parameters(name: str) -> list[str]:
        return list(inspect.signature(getattr(Trainer, name)).parameters)

    assert parameters("_clip_grad_norm") == ["self", "model"]
    assert parameters("_get_grad_norm") == ["self", "model", "grad_norm"]
    assert parameters("_prepare_inputs") == ["self", "inputs"]
    assert parameters("create_accelerator_and_postprocess") == ["self"]
    assert parameters("training_step") == ["self", "model", "inputs", "num_items_in_batch"]
    source = inspect.getsource(Trainer)
    for text in (
        "self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)", "model.zero_grad()",
        "model.train()", "self.args.logging_nan_inf_filter", "self._clip_grad_norm(model)",
    ):  # fmt: skip
        assert text in source, text
