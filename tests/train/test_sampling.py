"""`train_sampling_strategy: group_by_length` in a Trainer: epochs, accumulation, resuming."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from torch.utils.data import RandomSampler
from transformers import TrainerCallback

from pyralis.data.grouped import GroupedSampler
from tests.train.test_trainer import make_trainer, ragged_rows, tiny_model


def rows(count: int) -> Dataset:
    found = ragged_rows(count)
    for number, row in enumerate(found):
        row["input_ids"][0] = number  # by which a batch tells its rows
        row["length"] = len(row["input_ids"])  # type: ignore[assignment]
    return Dataset.from_list(found)


def trained(folder: Path, steps_seen: list[list[int]], callbacks: Any = (), resume: Any = None, **options: Any) -> Any:
    """Train, keeping the rows of each step."""
    trainer = make_trainer(
        folder, tiny_model(), rows(30), list(callbacks), train_sampling_strategy="group_by_length", **options
    )
    micro: list[int] = []

    step = trainer.training_step

    def noted_step(model: Any, inputs: dict[str, Any], *args: Any) -> Any:
        micro.extend(inputs["input_ids"][:, 0].tolist())
        return step(model, inputs, *args)

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps_seen.append(sorted(micro))
            micro.clear()

    trainer.training_step = noted_step
    trainer.add_callback(Steps())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_each_epoch_has_every_row_once_whatever_the_split(tmp_path: Path) -> None:
    seen: dict[int, list[list[int]]] = {}
    for size in (1, 2, 4):
        steps = seen[size] = []
        trained(tmp_path, steps, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
                num_train_epochs=3)  # fmt: skip
        assert len(steps) == 3 * 8
        for epoch in range(3):
            assert sorted(chain(*steps[8 * epoch : 8 * epoch + 8])) == list(range(30))
    assert seen[1][:8] != seen[1][8:16]
    assert seen[1] == seen[2] == seen[4]


def test_a_resumed_run_goes_on_with_the_same_rows(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 11
            return control

    options = {"per_device_train_batch_size": 4, "num_train_epochs": 3}
    whole: list[list[int]] = []
    trained(tmp_path / "whole", whole, **options)
    parts: list[list[int]] = []
    options |= {"save_strategy": "steps", "save_steps": 11}
    trained(tmp_path / "parts", parts, [Stop()], **options)
    trained(tmp_path / "parts", parts, resume=str(tmp_path / "parts" / "checkpoint-11"), **options)
    assert parts == whole


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_other_strategies_and_rows_are_transformers(strategy: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_model(), rows(5), train_sampling_strategy=strategy)
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, GroupedSampler if strategy == "group_by_length" else RandomSampler)
    plain = make_trainer(tmp_path, tiny_model(), ragged_rows(5), train_sampling_strategy=strategy)
    assert not isinstance(plain._get_train_sampler(), GroupedSampler)
