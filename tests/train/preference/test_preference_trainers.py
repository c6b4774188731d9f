"""pyralis.KTOTrainer and ORPOTrainer beside TRL's: the same losses on fast layers, old arguments taken."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from transformers import TrainingArguments
from trl.experimental import orpo

from pyralis.models.surgery import report
from pyralis.train.old_trainer_names import say_once
from pyralis.train.preference.preference_trainers import KTOConfig, KTOTrainer, ORPOConfig, ORPOTrainer
from tests.tiny import build_tiny_model, make_tiny_tokenizer
from tests.train.sft_runs import DEFAULTS, LORA, losses

JUDGED = [
    {"prompt": f"hello {i}", "completion": " good" * (1 + i % 3), "label": i % 3 > 0} for i in range(8)
]  # fmt: skip
PAIRS = [{"prompt": f"hello {i}", "chosen": " good" * (1 + i % 3), "rejected": " bad" * (1 + i % 4)} for i in range(8)]
KTO = (trl.KTOTrainer, trl.KTOConfig, KTOTrainer, KTOConfig, JUDGED)
ORPO = (orpo.ORPOTrainer, orpo.ORPOConfig, ORPOTrainer, ORPOConfig, PAIRS)


def arguments(rows: Any) -> dict[str, Any]:
    return {"train_dataset": Dataset.from_list(rows), "peft_config": copy.deepcopy(LORA)}


@pytest.mark.parametrize("kind", [KTO, pytest.param(ORPO, marks=pytest.mark.full)], ids=["KTO", "ORPO"])
def test_losses_are_those_of_trl(kind: tuple[Any, ...], tmp_path: Path) -> None:
    theirs, their_config, ours, our_config, rows = kind
    found = []
    for cls, config in ((theirs, their_config), (ours, our_config)):
        args = config(output_dir=str(tmp_path), **DEFAULTS)
        trainer = cls(model=build_tiny_model(), args=args, processing_class=make_tiny_tokenizer(), **arguments(rows))
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert len(set(found[0])) == 3
    assert report(trainer.model).fast_layers == 2, report(trainer.model).lines


@pytest.mark.parametrize(("cls", "rows"), [(KTOTrainer, JUDGED), (ORPOTrainer, PAIRS)], ids=["KTO", "ORPO"])
def test_the_call_of_an_older_script(cls: Any, rows: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    plain = {name: value for name, value in DEFAULTS.items() if name != "max_length"}
    with caplog.at_level(logging.WARNING):
        trainer = cls(
            model=build_tiny_model(), args=TrainingArguments(str(tmp_path), **plain | {"max_steps": 1}), beta=0.3,
            max_length=48, max_prompt_length=24, tokenizer=make_tiny_tokenizer(), **arguments(rows),
        )  # fmt: skip
    assert (trainer.args.beta, trainer.args.max_length) == (0.3, 48)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "tokenizer= is called processing_class= today" in said
    assert "max_prompt_length= has no effect" in said
    trainer.train()
