"""The trainer of a run, by its task."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from pyralis.data.collate import Collator
from pyralis.train.config.train_config import TrainConfig
from pyralis.train.preference.dpo_run import PreferenceTrainer, dpo_loss
from pyralis.train.setup import PreparedData, PreparedModel, base_name
from pyralis.train.stream_trainer import StreamTrainer
from pyralis.train.trainer import PyralisTrainer


def make_trainer(
    config: TrainConfig, arguments: TrainingArguments, prepared: PreparedData, model: PreparedModel
) -> PyralisTrainer:
    common: dict[str, Any] = {
        "train_dataset": prepared.data.train,
        "eval_dataset": prepared.data.eval,
        "processing_class": prepared.tokenizer,
        "template": prepared.template,
        "base_name": base_name(config),
        "embedding_learning_rate": config.embedding_learning_rate,
    }
    trainer: PyralisTrainer
    if config.task_type == "dpo":
        trainer = PreferenceTrainer(model.model, arguments, loss=dpo_loss(config), config=config, **common)
    else:
        kind = StreamTrainer if prepared.data.is_stream else PyralisTrainer
        trainer = kind(model.model, arguments, Collator.for_tokenizer(prepared.tokenizer), **common)
    trainer.bf16_update = "stochastic" if config.bf16_update == "stochastic" else "split"
    trainer.optimizer_in_bwd = config.train_mode == "full" and config.optimizer_in_bwd
    trainer.cuda_graph = config.cuda_graph
    return trainer
