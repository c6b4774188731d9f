"""pyralis.SFTTrainer beside TRL's: the same losses, whatever the batches and the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TrainerCallback

from pyralis.models.surgery import accelerate, report
from pyralis.train.sft_trainer import SFTTrainer
from tests.tiny import build_tiny_model, make_tiny_model, make_tiny_tokenizer
from tests.train.sft_runs import (
    CHATS,
    COMPLETIONS,
    GENERATION_JINJA,
    LORA,
    TEXTS,
    assert_alike,
    build,
    losses,
    trained,
)


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (CHATS, {}),
        (CHATS, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
        (CHATS, {"packing": True}),
        pytest.param(CHATS, {"packing": True, "packing_strategy": "wrapped"}, marks=pytest.mark.full),
        (CHATS, {"padding_free": True, "max_length": None}),
        (CHATS, {"assistant_only_loss": True}),
        (CHATS, {"gradient_checkpointing": False, "neftune_noise_alpha": 5}),
        (CHATS, {"label_smoothing_factor": 0.1}),
        pytest.param(CHATS, {"loss_type": "dft"}, marks=pytest.mark.full),
        (COMPLETIONS, {}),
        pytest.param(COMPLETIONS, {"packing": True}, marks=pytest.mark.full),
        pytest.param(COMPLETIONS, {"completion_only_loss": False}, marks=pytest.mark.full),
        pytest.param(TEXTS, {}, marks=pytest.mark.full),
        (TEXTS, {"eval_strategy": "steps", "eval_steps": 1}),
    ],
    ids=lambda given: "-".join(map(str, given.items())) if isinstance(given, dict) else next(iter(given[0])),
)
def test_losses_are_those_of_trl(rows: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    trainers = []
    for cls in (trl.SFTTrainer, SFTTrainer):
        tokenizer = make_tiny_tokenizer(chat_template=GENERATION_JINJA)
        given = {"eval_dataset": Dataset.from_list(rows[:5])} if "eval_strategy" in settings else {}
        trainers.append(trained(cls, tmp_path, rows, settings=settings, processing_class=tokenizer, **given))
    stock, ours = trainers
    assert_alike(ours, stock)
    if given:
        assert losses(ours, "eval_loss") == pytest.approx(losses(stock, "eval_loss"), rel=1e-6)
    assert report(ours.model).fast_layers == 2, report(ours.model).lines
    assert (ours.loss_reason(ours.model) is None) is (settings.get("loss_type") != "dft")


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_full_training_and_a_family_that_runs_stock(family: str, tmp_path: Path) -> None:
    stock, ours = (
        trained(cls, tmp_path, model=build_tiny_model(family), peft_config=None, settings={"max_grad_norm": 0.5})
        for cls in (trl.SFTTrainer, SFTTrainer)
    )
    assert_alike(ours, stock)
    assert (ours.loss_reason(ours.model) is None) is (family == "gemma2")


def test_the_metrics_of_trl_are_there_when_asked_for(tmp_path: Path) -> None:
    stock = trained(trl.SFTTrainer, tmp_path)
    ours = trained(SFTTrainer, tmp_path, settings={"token_metrics": True})
    assert_alike(ours, stock)
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert losses(ours, name) == pytest.approx(losses(stock, name), rel=1e-6)
    assert not losses(trained(SFTTrainer, tmp_path), "entropy")


def test_compute_metrics_and_callbacks(tmp_path: Path) -> None:
    seen: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)

    def accuracy(prediction: Any) -> dict[str, float]:
        right = (prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]).mean()
        return {"right": float(right), "mean_logit": float(prediction.predictions[:, :4].mean())}

    results = []
    for cls in (trl.SFTTrainer, SFTTrainer):
        trainer = trained(
            cls, tmp_path, TEXTS, eval_dataset=Dataset.from_list(TEXTS[:4]), compute_metrics=accuracy,
            callbacks=[Count()],
        )  # fmt: skip
        results.append(trainer.evaluate())
    assert seen == [1, 2, 3] * 2
    for name in ("eval_loss", "eval_right", "eval_mean_logit"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-6)


def test_loraplus(tmp_path: Path) -> None:
    trainers = []
    for cls in (trl.SFTTrainer, SFTTrainer):
        torch.manual_seed(0)
        model = get_peft_model(build_tiny_model(), LORA)
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8)
        trainers.append(trained(cls, tmp_path, model=model, peft_config=None, optimizers=(optimizer, None)))
    stock, ours = trainers
    assert_alike(ours, stock)
    assert len(ours.optimizer.param_groups) > 1


def test_a_model_by_name(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    stock, ours = (trained(cls, tmp_path, model=str(folder)) for cls in (trl.SFTTrainer, SFTTrainer))
    assert_alike(ours, stock)
    assert report(ours.model).fast_layers == 2
    off = build(SFTTrainer, tmp_path, settings={"acceleration": "off"})
    assert report(off.model).fast_layers == 0


def quantised(folder: Path) -> Any:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def test_adapters_of_a_quantised_model_stay_float32(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    model = get_peft_model(quantised(folder), LORA)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    places = {name: p.data_ptr() for name, p in model.named_parameters() if p.requires_grad}
    ours = build(SFTTrainer, tmp_path, model=model, peft_config=None)
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, before[name])
            assert parameter.data_ptr() == places[name]
    ours.train()
    assert report(ours.model).fast_layers == 2, report(ours.model).lines

    stock = build(trl.SFTTrainer, tmp_path, model=get_peft_model(quantised(folder), LORA), peft_config=None)
    with torch.no_grad():
        for name, parameter in stock.model.named_parameters():
            if parameter.requires_grad:
                parameter.data = before[name].clone()
    stock.train()
    assert_alike(ours, stock)

    made_here = build(SFTTrainer, tmp_path, model=quantised(folder))
    assert {p.dtype for p in made_here.model.parameters() if p.requires_grad} == {torch.float32}


# ---- what is overridden ----


def test_a_subclass_sees_the_batch_of_the_collator(tmp_path: Path) -> None:
    class Mine(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            assert sorted(inputs) == ["attention_mask", "input_ids", "labels"]
            inputs["labels"][:, :4] = -100  # what was known of the labels no longer holds
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Theirs(trl.SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs["labels"][:, :4] = -100
            return super().compute_loss(model, inputs, *args, **kwargs)

    assert_alike(trained(Mine, tmp_path), trained(Theirs, tmp_path))


def test_nothing_is_sent_and_trl_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **kwargs: sent.append(kwargs["topic"]))
    monkeypatch.delenv("CI", raising=False)
    build(trl.SFTTrainer, tmp_path)
    assert len(sent) == 1, "TRL no longer sends through this function"
    build(SFTTrainer, tmp_path)
    assert len(sent) == 1


def test_an_accelerated_model_is_taken_as_it_is(tmp_path: Path) -> None:
    model = build_tiny_model()
    accelerate(model)
    model = get_peft_model(model, LORA)
    assert isinstance(model, PeftModel)
    ours = trained(SFTTrainer, tmp_path, model=model, peft_config=None)
    assert report(ours.model).fast_layers == 2
