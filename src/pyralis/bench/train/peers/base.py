"""What a peer's runner has to say; the rest is the same for all."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoTokenizer, default_data_collator

from pyralis.bench.train.clock import Measured, StepClock
from pyralis.bench.train.settings import Job, Loop, Shape
from pyralis.bench.train.start import make_batch, put_back, snapshot, start_adapter
from pyralis.bench.train.trainer_loop import run_trainer, trainer_arguments, training_rows
from pyralis.compat import checkpointing_argument


class Peer(ABC):
    """One library: `load` a variant, then `run` cases of it."""

    def __init__(self, job: Job) -> None:
        self.job, self.bench, self.made = job, job.bench, job.made
        self.device = torch.device(job.made.device)
        self.dtype: torch.dtype = getattr(torch, job.made.facts.dtype)
        self.model: Any = None
        self._start: dict[str, Tensor] = {}

    # ---- said by each peer ----

    @abstractmethod
    def prepare(self, variant: str) -> nn.Module:
        """The model, loaded or as it was left, with its adapter and set to keep what `variant` says, in train mode."""

    @abstractmethod
    def trainer(self, variant: str, arguments: dict[str, Any], rows: Any) -> Any:
        """The Trainer that this peer's users have."""

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.model(**batch).loss

    def optimizer(self) -> Optimizer:
        """8-bit AdamW of bitsandbytes, which all but Pyralis have."""
        from bitsandbytes.optim import AdamW8bit

        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return AdamW8bit(parameters, lr=self.bench.learning_rate, weight_decay=0.0)

    def autocast(self) -> AbstractContextManager[Any]:
        """As Trainer has it with `bf16=True`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    # ---- the same for all ----

    def load(self, variant: str) -> None:
        model: Any = self.prepare(variant)
        if model is not self.model:
            if self.bench.mode != "full":
                start_adapter(model)
            self._start = snapshot(model)
        self.model = model

    def drop_model(self) -> None:
        """Free the model's memory for the next one."""
        self.model = None
        free_memory()

    def run(self, variant: str, loop: Loop, shape: Shape, warmup: int) -> Measured:
        """Train for some steps from the start; raises what the peer raises."""
        put_back(self.model, self._start)
        free_memory()  # what another variant has left reserved
        clock = StepClock(self.device, warmup, self.bench.steps, self.bench.profile)
        batch = make_batch(shape, self.made.facts.vocabulary)
        if loop == "trainer":
            arguments = trainer_arguments(self.bench, shape, clock, self.job.results.parent / "trainer")
            mixed = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.dtype)
            arguments |= {name: name == mixed for name in ("bf16", "fp16")}
            return run_trainer(self.trainer(variant, arguments, training_rows(batch, clock.total)), clock)
        return self._bare(clock, {name: values.to(self.device) for name, values in batch.items()})

    def _bare(self, clock: StepClock, batch: Mapping[str, Tensor]) -> Measured:
        optimizer = self.optimizer()
        clock.start()
        for _ in range(clock.total):
            with self.autocast():
                loss = self.loss(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clock.tick(loss.detach())
        return clock.measured()

    def sft_trainer(self, arguments: dict[str, Any], rows: Any, *, checkpointed: bool) -> Any:
        """`trl.SFTTrainer` with its defaults, on rows that are tokens already."""
        from trl import SFTConfig, SFTTrainer

        options: dict[str, Any] = {
            checkpointing_argument("gradient_checkpointing"): checkpointed,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
        return SFTTrainer(
            model=self.model,
            args=SFTConfig(**arguments, **options),
            train_dataset=rows,
            data_collator=default_data_collator,
            processing_class=self.tokenizer(),
        )

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.made.folder)

    @property
    def folder(self) -> Path:
        return self.made.folder


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
