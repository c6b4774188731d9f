"""`PyralisTrainingArguments`: transformers' arguments with what our trainers know beyond them."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class PyralisTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with a learning rate of their own for embeddings and head."""

    embedding_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of what is trained of the embeddings and the head; None: learning_rate."},
    )
