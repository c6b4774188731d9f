"""TRL's KTOTrainer and ORPOTrainer on fast layers, called as today or as by older scripts. Their losses are TRL's."""

from __future__ import annotations

from dataclasses import dataclass

import trl
from trl.experimental import orpo

from pyralis.train.old_trainer_names import TrainerCall
from pyralis.train.trl_trainer import TrlConfig, TrlTrainer


@dataclass
class KTOConfig(TrlConfig, trl.KTOConfig):
    """`trl.KTOConfig` with fields of ours. `bf16` defaults to what the device computes in."""


class KTOTrainer(TrlTrainer, trl.KTOTrainer):
    """`trl.KTOTrainer` whose layers are fast."""

    trl_trainer = trl.KTOTrainer
    trl_config = KTOConfig

    def adapt(self, call: TrainerCall) -> tuple[str, ...]:
        """Plain `TrainingArguments` draw rows at random, which this loss forbids."""
        if call.args.loss_type != "kto" or call.args.train_sampling_strategy == "sequential":
            return ()
        call.args.train_sampling_strategy = "sequential"
        return ("rows are taken in order: the KL term of a row comes from its neighbour",)


@dataclass
class ORPOConfig(TrlConfig, orpo.ORPOConfig):
    """`trl.experimental.orpo.ORPOConfig` with fields of ours. `bf16` defaults to what the device computes in."""


class ORPOTrainer(TrlTrainer, orpo.ORPOTrainer):
    """`trl.experimental.orpo.ORPOTrainer` whose layers are fast."""

    trl_trainer = orpo.ORPOTrainer
    trl_config = ORPOConfig
