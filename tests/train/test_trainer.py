"""The trainer: gradients independent of the split into micro-batches, token-weighted evaluation, whole checkpoints."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from pyralis.train.checkpoints.checkpoint import list_checkpoints
from pyralis.train.trainer import PyralisTrainer

VOCAB = 31


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64,
        )
    )  # fmt: skip


def ragged_rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = 3 + (7 * index) % 11
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        learnt = 1 + (5 * index) % (length - 1)
        rows.append({"input_ids": ids, "labels": [-100] * (length - learnt) + ids[length - learnt :]})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(r["input_ids"]) for r in rows)

    def pad(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (longest - len(values))

    return {
        "input_ids": torch.tensor([pad(r["input_ids"], 0) for r in rows]),
        "attention_mask": torch.tensor([pad([1] * len(r["input_ids"]), 0) for r in rows]),
        "labels": torch.tensor([pad(r["labels"], -100) for r in rows]),
    }


class KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def make_trainer(folder: Path, model: Any, rows: list, callbacks: list | None = None, **kwargs: Any) -> PyralisTrainer:
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "no", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "remove_unused_columns": False,
        "train_sampling_strategy": "sequential", "max_grad_norm": 0.0,
    }  # fmt: skip
    args = TrainingArguments(**{**defaults, **kwargs})
    eval_rows = rows if args.eval_strategy != "no" else None
    return PyralisTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collate,
        callbacks=callbacks or [],
    )


def step_gradients(tmp_path: Path, batch: int, accumulation: int, model: Any, rows: list, **kwargs: Any) -> tuple:
    keep = KeepGradients()
    trainer = make_trainer(
        tmp_path, copy.deepcopy(model), rows, [keep], per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, max_steps=1, **kwargs,
    )  # fmt: skip
    trainer.train()
    return keep.gradients, trainer.state.log_history[0]["loss"], trainer


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_do_not_depend_on_the_split(tmp_path: Path, smoothing: float) -> None:
    model, rows = tiny_model(), ragged_rows(8)
    exact = copy.deepcopy(model).double()
    batch = collate(rows)
    logits = exact(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets, kept = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
    log_p = logits[:, :-1].log_softmax(-1)[kept]
    nll = -log_p.gather(1, targets[kept][:, None])[:, 0]
    loss = ((1 - smoothing) * nll - smoothing * log_p.mean(-1)).sum() / kept.sum()
    loss.backward()
    expected = {n: p.grad for n, p in exact.named_parameters()}
    for size, accumulation in ((1, 8), (2, 4), (4, 2), (8, 1)):
        gradients, logged, trainer = step_gradients(
            tmp_path, size, accumulation, model, rows, label_smoothing_factor=smoothing
        )
        assert logged == pytest.approx(loss.item(), rel=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            error = (gradient.double() - expected[name]).norm() / expected[name].norm()
            assert error < 1e-5, (name, size, accumulation, float(error))
        assert trainer.token_counts.supervised == int(kept.sum())
        assert trainer.token_counts.total == int(batch["attention_mask"].sum())


def test_a_short_last_accumulation_is_normalised_by_its_own_tokens(tmp_path: Path) -> None:
    model, rows = tiny_model(), ragged_rows(6)
    frozen = {"learning_rate": 0.0, "num_train_epochs": 1}
    trainer = make_trainer(
        tmp_path, copy.deepcopy(model), rows, per_device_train_batch_size=1, gradient_accumulation_steps=4, **frozen
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    whole = make_trainer(tmp_path, copy.deepcopy(model), rows[4:], per_device_train_batch_size=2, **frozen)
    whole.train()
    assert losses[1] == pytest.approx(whole.state.log_history[0]["loss"], rel=1e-6)


def test_evaluation_weighs_tokens(tmp_path: Path) -> None:
    model, rows = tiny_model(), ragged_rows(7)
    results = []
    for size in (1, 3, 7):
        trainer = make_trainer(tmp_path, model, rows, per_device_eval_batch_size=size, eval_strategy="steps")
        results.append(trainer.evaluate())
    assert results[0]["eval_tokens"] == sum(sum(v != -100 for v in r["labels"][1:]) for r in rows)
    for result in results[1:]:
        assert result["eval_loss"] == pytest.approx(results[0]["eval_loss"], rel=1e-6)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    rows = ragged_rows(12)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4,
        "lr_scheduler_type": "linear", "train_sampling_strategy": "random", "max_grad_norm": 1.0,
    }  # fmt: skip
    straight = make_trainer(tmp_path / "a", tiny_model(), rows, **settings)
    straight.train()

    class StopAt5(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 5
            return control

    first = make_trainer(tmp_path / "b", tiny_model(), rows, [StopAt5()], **settings)
    first.train()
    checkpoint = list_checkpoints(tmp_path / "b")[-1][1]
    assert checkpoint.name == "checkpoint-4"
    counts = json.loads((checkpoint / "pyralis_counts.json").read_text())
    second = make_trainer(tmp_path / "b", tiny_model(seed=9), rows, **settings)
    second.token_counts.restore(**counts)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == straight.state.global_step == 12
    for (name, a), (_, b) in zip(straight.model.named_parameters(), second.model.named_parameters()):
        assert torch.equal(a, b), name
    assert second.token_counts.supervised == straight.token_counts.supervised
    assert second.token_counts.total == straight.token_counts.total


def test_a_save_that_dies_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, folder: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(PyralisTrainer, "_save_optimizer_and_scheduler", fail)
    trainer = make_trainer(tmp_path, tiny_model(), ragged_rows(2), save_strategy="steps", save_steps=1, max_steps=1)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert list_checkpoints(tmp_path) == []
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_best_checkpoint_is_kept_and_named(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, tiny_model(), ragged_rows(6), per_device_train_batch_size=2, max_steps=4, save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, save_total_limit=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.is_dir()
    assert best.parent == tmp_path
    assert len(list_checkpoints(tmp_path)) <= 2
