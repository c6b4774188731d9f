"""What the CPU knows of a batch: right, carried to the loss, and dropped when the batch is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pyralis import PyralisTrainer, PyralisTrainingArguments
from pyralis.data.collate import Collator
from pyralis.models.layout import BatchShape, batch_layout
from pyralis.models.surgery import accelerate
from pyralis.ops.attention_spec import AttentionLayout
from pyralis.train import fast_loss
from pyralis.train.batch_facts import FACTS, FactCollator, take_facts
from tests.tiny import build_tiny_model, make_tiny_tokenizer

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]},
    {"input_ids": [5, 6, 7], "labels": [5, -100, 7]},
]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded(side: str) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.padding_side = side
    for collator in (DataCollatorForSeq2Seq(tokenizer), *([Collator(0)] if side == "right" else [])):
        batch, facts = take_facts(FactCollator(collator)(ROWS))
        assert facts is not None
        assert FACTS not in batch
        assert (facts.supervised_rows, facts.tokens, facts.padding_side) == (4 if side == "right" else 5, 8, side)
        assert facts.hints(batch) == {"padding_side": side, "sequence_lengths": (5, 3)}
        assert facts.hints({}) == {}


def test_a_mask_with_holes_and_other_batches() -> None:
    def holes(rows: Any) -> dict[str, torch.Tensor]:
        batch = Collator(0)(rows)
        batch["attention_mask"][0, 2] = 0
        return batch

    facts = FactCollator(holes)(ROWS)[FACTS]
    assert (facts.tokens, facts.padding_side, facts.lengths) == (7, None, None)
    images = {"pixel_values": torch.zeros(2, 3)}
    assert FactCollator(lambda _: images)(ROWS) is images
    assert take_facts(images) == (images, None)


def test_packed() -> None:
    theirs = DataCollatorForLanguageModeling(0, padding_free=True)

    def earlier(rows: Any) -> dict[str, Any]:  # as TRL had it before it gave bounds
        return {name: theirs(rows)[name] for name in ("input_ids", "labels", "position_ids")}

    batch, facts = take_facts(FactCollator(earlier)(ROWS))
    assert facts is not None
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert (facts.supervised_rows, facts.tokens, facts.padding_side) == (4, 8, None)
    assert facts.hints(batch) == {"sequence_lengths": (5, 3)}
    given = {"cu_seq_lens_q": torch.tensor([0, 8])}
    assert FactCollator(lambda rows: earlier(rows) | given)(ROWS)[FACTS].lengths is None


def test_packed_rows() -> None:
    rows = [{**ROWS[0], "position_ids": [0, 1, 0, 1, 2]}, {**ROWS[1], "position_ids": [0, 1, 2]}]
    batch, facts = take_facts(FactCollator(Collator(0))(rows))
    assert facts is not None
    assert facts.lengths == (2, 3, 3, 2)  # the padding is one of them
    found, looked = (
        batch_layout(BatchShape(2, 5, torch.device("cpu")), {**batch, **hints}) for hints in (facts.hints(batch), {})
    )
    assert isinstance(found, AttentionLayout)
    assert isinstance(looked, AttentionLayout)
    assert found.cu_seqlens is not None
    assert looked.cu_seqlens is not None
    assert found.cu_seqlens.tolist() == looked.cu_seqlens.tolist() == [0, 2, 5, 8, 10]
    assert found.max_seqlen == looked.max_seqlen == 3


def test_they_reach_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: the trainer's collator pads labels by default, and embeddings have their own rate by the arguments."""
    seen: list[tuple[Any, Any]] = []
    loss = fast_loss.causal_lm_loss

    def spy(model: Any, inputs: Any, *args: Any, **settings: Any) -> torch.Tensor:
        seen.append((inputs.get("padding_side"), settings.get("supervised_rows")))
        assert (inputs.get("sequence_lengths") is None) == (inputs.get("padding_side") is None)
        return loss(model, inputs, *args, **settings)

    monkeypatch.setattr(fast_loss, "causal_lm_loss", spy)
    model = build_tiny_model()
    accelerate(model)
    args = PyralisTrainingArguments(
        str(tmp_path), embedding_learning_rate=1e-4, learning_rate=1e-3, max_steps=2, per_device_train_batch_size=2,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_num_workers=1,
    )  # fmt: skip
    data = Dataset.from_list(ROWS * 2)
    trainer = PyralisTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=make_tiny_tokenizer())
    trainer.train()
    trainer.evaluate()
    assert len(seen) == 3
    assert all(side == "right" and 2 <= rows <= 8 for side, rows in seen)
    assert seen[2][1] == 8
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups if group["params"]}
    assert rates == {1e-3, 1e-4}
    assert isinstance(trainer.data_collator, Collator)
    inputs = trainer._prepare_inputs(FactCollator(Collator(0))(ROWS))
    inputs["labels"][0, 3] = -100
    trainer.compute_loss(model, inputs)
    assert seen[-1] == (None, None), "what was known no longer holds"
