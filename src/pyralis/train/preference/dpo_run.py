"""Preference training by `pyralis train`: the trainer, and where its reference comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from pyralis.data.cache import cache_root
from pyralis.data.collate import Collator
from pyralis.data.pairs import PairCollator, PairLayout
from pyralis.errors import ConfigError
from pyralis.models.fingerprint import weights_fingerprint
from pyralis.models.shared_prompts import sharing_reason
from pyralis.models.surgery import report
from pyralis.train.config.train_config import TrainConfig
from pyralis.train.preference.dpo_loss import DPOLoss
from pyralis.train.preference.dpo_metrics import PreferenceMetrics
from pyralis.train.preference.dpo_precompute import content_key, precompute
from pyralis.train.preference.dpo_reference import Reference
from pyralis.train.preference.dpo_step import PreferenceStep
from pyralis.train.trainer import PyralisTrainer


class PreferenceTrainer(PyralisTrainer):
    """`PyralisTrainer` for preference rows (`data/store.py`), by DPO's losses.

    - The loss of an optimizer step is the sum over its pairs divided by their number, whatever the split.
    - Dropout is off in the model, as the reference has none.
    - The reference is the model as it was before training: its base where the adapter is new, else computed before the
      first step and kept on disk.
    - Logged beside the loss: rewards, their margin and accuracy, log-probabilities.
    """

    def __init__(
        self, model: nn.Module, args: TrainingArguments, *, loss: DPOLoss, config: TrainConfig, **kwargs: Any
    ) -> None:
        no_dropout(model)
        pad = Collator.for_tokenizer(kwargs["processing_class"]).pad_token_id
        self.reference_reason = beforehand_reason(config, model)
        self._rows = [rows for name in ("train", "eval") if (rows := kwargs.get(f"{name}_dataset")) is not None]
        self._values = None  # a table that the collator holds, filled before the first batch is made
        if self.reference_reason is not None:
            self._values = np.full((sum(map(len, self._rows)), 2), np.nan, np.float32)
            first = 0
            for name, rows in zip(("train", "eval"), self._rows):
                kwargs[f"{name}_dataset"] = _numbered(rows, first)
                first += len(rows)
        super().__init__(model, args, PairCollator(pad), **kwargs)
        self.config = config
        self.data_collator: Any = PairCollator(pad, self._choose_layout(), reference=self._values)
        self.step = PreferenceStep(Reference(model), loss)
        self._collected = {mode: PreferenceMetrics(loss.beta) for mode in ("train", "eval")}

    def _choose_layout(self) -> PairLayout:
        model: Any = self.model
        found = report(model)
        if not found.layers or found.fast_layers < len(found.layers):
            return "padded"
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        return "packed" if sharing_reason(model, dtype) else "shared"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the run's panel should know."""
        reason = self.reference_reason
        where = self.step.reference.kind if reason is None else f"the model before training, computed first: {reason}"
        model: Any = self.model
        sharing = "the prompt of a pair is computed once"
        if self.data_collator.layout != "shared":
            sharing = f"the prompt of a pair is computed twice: {sharing_reason(model) or 'some layers run stock'}"
        return f"reference: {where}", sharing, "dropout is off, as the reference has none"

    # ---- reference ----

    def prepare_reference(self, progress: Callable[[int], None] | None = None) -> None:
        """Compute the reference now, where it has to be: the model is as it was before training.

        A model that will be sharded is waited for: its parts are put in place when training begins. In a run that goes
        on from a checkpoint they are not the first ones any more; then all values have to be on disk.
        """
        if self._values is None:
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            self.add_callback(_AtTheBeginning(self))
            return
        model: Any = self.model
        self._fill(weights_fingerprint(model), progress)

    def _fill(self, weights: str, progress: Callable[[int], None] | None = None, *, from_disk: bool = False) -> None:
        """Values from disk, or by forwards of the model as it stands. weights: names it in the cache."""
        assert self._values is not None
        model: Any = self.model
        root = cache_root(self.config.cache_dir).parent / "references"
        collate = replace(self.data_collator, reference=None)
        first = 0
        for rows in self._rows:
            key = content_key(rows, weights, str(self.accelerator.mixed_precision), model.dtype)
            self._values[first : first + len(rows)] = precompute(
                rows, collate, _missing if from_disk else self._reference_logps, root / key,
                batch_size=self.args.per_device_eval_batch_size, summed=self._summed, rank=self.args.process_index,
                processes=self.args.world_size, device=self.args.device,
                progress=None if progress is None else partial(_behind, progress, first),
            )  # fmt: skip
            first += len(rows)

    @torch.no_grad()
    def _reference_logps(self, batch: Any) -> Tensor:
        model: Any = self.model
        training = model.training
        model.eval()
        try:
            with self.accelerator.autocast():
                return self.step.reference.as_it_is(self._prepare_inputs(batch))
        finally:
            model.train(training)

    # ---- loss ----

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """The pairs of all micro-batches of an optimizer step, over all processes, are what its loss is divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        pairs: Any = sum(len(batch["response_lengths"]) for batch in batches) // 2
        supervised: Any = sum(len(batch["targets"]) for batch in batches)
        total = torch.stack([batch["num_tokens"] for batch in batches]).sum()
        if self.args.world_size > 1:
            counts = torch.stack([total.new_tensor(pairs), total.new_tensor(supervised), total]).to(device)
            pairs, supervised, total = self._summed(counts).unbind()
        self.token_counts.add(supervised, total)
        return batches, pairs

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = self.step(model, inputs)
        self._collected["train" if model.training else "eval"].add(inputs, result.scores, result.tokens)
        pairs = len(result.losses) if num_items_in_batch is None else num_items_in_batch
        loss = self.over_processes(result.losses.sum() / pairs, num_items_in_batch)
        return (loss, None) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            result = self.step(model, inputs)
        self._collected["eval"].add(inputs, result.scores, result.tokens)
        if self._eval_sums is not None:
            losses = result.losses.double()
            self._eval_sums.append(torch.stack([losses.sum(), losses.new_tensor(float(len(losses)))]))
        return result.losses.mean(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss is a mean over pairs; rewards and what else is logged stand beside it."""
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if output.metrics is not None:
            output.metrics[f"{prefix}_pairs"] = output.metrics.pop(f"{prefix}_tokens", 0)
            means = self._collected["eval"].take(self._summed, pooled=True)
            output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._collected["train"].take(self._summed, pooled=True)
        super().log(logs, start_time)

    def _summed(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")


def dpo_loss(config: TrainConfig) -> DPOLoss:
    """The loss that a config asks for."""
    if config.rpo_alpha is None:
        return DPOLoss((config.loss_type,), config.beta, label_smoothing=config.label_smoothing)
    weights = (1.0, config.rpo_alpha)
    return DPOLoss((config.loss_type, "sft"), config.beta, weights, config.label_smoothing)


class _AtTheBeginning(TrainerCallback):
    """Fills a trainer's reference values when a sharded model has been put in place."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._fill(_checkpoint_key(self.trainer.config), from_disk=state.global_step > 0)


def _behind(progress: Callable[[int], None], before: int, done: int) -> None:
    progress(before + done)


def _missing(batch: Any) -> Tensor:
    raise ConfigError(
        "the reference values of this run are not in the cache any more (cache_dir), and the model that they came from "
        "is sharded and already trained. Start anew with overwrite_output_dir: true."
    )


def _checkpoint_key(config: TrainConfig) -> str:
    """What the weights were read from, by name, size and date: those of a sharded model are nowhere whole."""
    named = [name for name in (config.model_name_or_path, config.load_adapter) if name]
    files = [path for name in named for path in sorted(Path(name).expanduser().glob("*")) if path.is_file()]
    about = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return repr((named, config.model_revision, config.train_mode, about))


def beforehand_reason(config: TrainConfig, model: nn.Module) -> str | None:
    """Why the reference has to be computed before training; None if the model without its adapter is the reference."""
    if config.train_mode == "full":
        return "all weights are trained"
    if config.load_adapter:
        return "the adapter goes on from what it was"
    if config.lora_bias != "none":
        return "biases of the base model are trained"
    assert isinstance(model, PeftModel)
    if any(bool(p.detach().any()) for name, p in model.named_parameters() if ".lora_B." in name):
        return "the adapter begins with something in it"
    return "precompute_ref_log_probs" if config.precompute_ref_log_probs else None


def no_dropout(model: nn.Module) -> None:
    """Dropout that never drops."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _numbered(rows: Dataset, first: int) -> Dataset:
    """With a column that points into the table of reference values."""
    return rows.add_column("row", np.arange(first, first + len(rows))).with_format("numpy")


__all__ = ["PreferenceTrainer", "beforehand_reason", "dpo_loss", "no_dropout"]
