"""What our trainers know beyond the arguments of transformers' and TRL's."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class LeanArguments:
    """What `LeanTrainer` reads."""

    embedding_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of what is trained of the embeddings and the head; None: learning_rate."},
    )
    bf16_update: str = field(
        default="split",
        metadata={
            "help": "How AdamW updates bfloat16 weights: split (their lower 16 bits are kept beside them), stochastic "
            "(rounding), or nearest, which loses small updates.",
            "choices": ["split", "stochastic", "nearest"],
        },
    )
    cuda_graph: str = field(
        default="auto",
        metadata={
            "help": "auto: on a GPU the steps of a fast model are recorded and replayed (docs/step-graphs.md); off.",
            "choices": ["auto", "off"],
        },
    )
    optimizer_in_bwd: bool = field(
        default=False,
        metadata={"help": "Update each layer as soon as its gradients are there; nothing is accumulated or clipped."},
    )


@dataclass
class PyralisTrainingArguments(LeanArguments, TrainingArguments):
    """`transformers.TrainingArguments` with what `LeanTrainer` reads beside them."""
