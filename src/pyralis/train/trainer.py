"""Hugging Face's Trainer with an exact loss over accumulation, token counts and atomic checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pyralis.data.collate import Collator
from pyralis.data.template import ChatTemplate, save_template
from pyralis.errors import ConfigError
from pyralis.models.staging import write_text
from pyralis.train.checkpoints.best_model import BestModel
from pyralis.train.checkpoints.checkpoint import STAGING_PREFIX, STATE_NAME, read_object, rotate_checkpoints, write_json
from pyralis.train.checkpoints.checksums import write_checksums
from pyralis.train.checkpoints.save_errors import save_errors_named
from pyralis.train.config.refusals import refusals_named
from pyralis.train.fast_loss import FastLossTrainer
from pyralis.train.loss import IGNORE_INDEX, supervised_loss_sum
from pyralis.train.sampling import EveryRowEvaluated, GroupedRows
from pyralis.train.timed_trainer import TimedTrainer
from pyralis.train.token_counts import TokenCounts
from pyralis.train.watch.watched_trainer import WatchedTrainer

COUNTS_NAME = "pyralis_counts.json"


class PyralisTrainer(TimedTrainer, BestModel, GroupedRows, EveryRowEvaluated, FastLossTrainer, WatchedTrainer):
    """`transformers.Trainer` for causal language models, at a fraction of its CPU time (`LeanTrainer`).

    - The loss of an optimizer step is the sum over its supervised tokens divided by their number, whatever the split
      into micro-batches and processes: 1 x 8, 2 x 4 and 8 x 1 give the same gradients.
    - Evaluation weighs tokens, not batches, and leaves out no row.
    - A checkpoint is written beside and renamed: `checkpoint-N` exists only when it is whole.
    - The chat template lies beside every saved model.
    - Embeddings and head may have a learning rate of their own.
    - A loss or gradient that is not finite stops it, or is skipped, where `watch_steps` says so.
    - It knows what its time goes into, where `time_parts` says so.
    """

    # compute_loss divides by the tokens of the whole accumulated batch, so Trainer must not divide again (5.23+ reads
    # this; earlier versions read model_accepts_loss_kwargs, set below).
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        *more: Any,
        template: ChatTemplate | None = None,
        base_name: str | None = None,
        embedding_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        """As Trainer's, with three more.

        data_collator: by default `Collator`, which pads labels too.
        template: goes with every saved model. base_name: what a saved adapter calls its base model.
        embedding_learning_rate: of what is trained of the embeddings and the head; by default that of `args`, if it is
            `PyralisTrainingArguments`.
        """
        use_cache = getattr(model.config, "use_cache", None)
        tokenizer = kwargs.get("processing_class")
        if data_collator is None and isinstance(tokenizer, PreTrainedTokenizerBase):
            data_collator = Collator.for_tokenizer(tokenizer)
        super().__init__(model, args, data_collator, *more, **kwargs)
        # Trainer writes its own `use_cache: false` into the model's config, which is saved; forward is told each time.
        if use_cache is not None:
            model.config.use_cache = use_cache
        self.template, self.base_name = template, base_name
        self.model_accepts_loss_kwargs = True
        if embedding_learning_rate is not None:
            self.embedding_learning_rate = embedding_learning_rate
        self._eval_sums: list[torch.Tensor] | None = None
        # Label smoothing goes through our loss; Trainer's smoother would take the labels away first.
        self.label_smoother = None

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum of the micro-batch's token losses / `num_items_in_batch` (its own number of tokens if not given).

        Logits are stored only where `return_outputs` asks for them, or the model's head is not a plain one.
        """
        smoothing = self.args.label_smoothing_factor
        if not return_outputs:
            loss = self.fast_loss(model, inputs, num_items_in_batch, smoothing)
            return self.over_processes(loss, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        loss, count = supervised_loss_sum(outputs.logits, labels, label_smoothing=smoothing)
        loss = loss / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return self.over_processes(loss, num_items_in_batch), outputs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        if not prediction_loss_only or self._eval_sums is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        count = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.fast_loss(model, inputs, 1.0)
        self._eval_sums.append(torch.stack([loss.double(), count.double()]))
        return loss / count.clamp(min=1), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, with the loss weighted by tokens and `{prefix}_tokens` beside it."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        self._eval_sums = []
        try:
            output = super().evaluation_loop(*args, **kwargs)
            if self._eval_sums and output.metrics is not None:
                sums = torch.stack(self._eval_sums).sum(0)
                sums = self.accelerator.reduce(sums, reduction="sum")
                loss_sum, count = sums.tolist()
                output.metrics[f"{prefix}_loss"] = loss_sum / max(count, 1.0)
                output.metrics[f"{prefix}_tokens"] = int(count)
        finally:
            self._eval_sums = None
        return output

    # ---- optimizer ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        with refusals_named(f"optim: {_word(self.args.optim)} cannot be used"):
            return super().create_optimizer(model)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        with refusals_named(f"lr_scheduler_type: {_word(self.args.lr_scheduler_type)} cannot be used"):
            return super().create_scheduler(*args, **kwargs)

    # ---- checkpoints ----

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a damaged file makes torch.load raise anything
            raise ConfigError(
                f"{checkpoint} cannot be resumed from: its optimizer state is damaged or of another run "
                f"({type(error).__name__}). Without that folder the run goes on from the checkpoint before it."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The chat template goes with the weights, into checkpoints too: they can be talked to and merged. The pickled
        arguments do not: pyralis_config.json says it all.

        An adapter names its base model by `base_name`, set only in what was saved: PEFT, which compares vocabularies
        with the base model when it saves, would look for such a name on the hub."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            if self.template is not None:
                save_template(self.template, folder)
            if self.base_name is not None:
                name_base_model(folder, self.base_name)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write `checkpoint-N` beside, with checksums, rename it, then delete what `save_total_limit` does not keep.

        Raises:
            SaveError: it could not be written, a full disk most of all; checkpoints that were there are whole.
        """
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_dir / f"{STAGING_PREFIX}{final.name}"
        with self.timed("saving"), save_errors_named(f"{final} could not be saved", staging, run_dir):
            self._write_checkpoint(run_dir, final, staging, trial)

    def _write_checkpoint(self, run_dir: Path, final: Path, staging: Path, trial: Any) -> None:
        if trial is None:
            self.store_flos()
        if self.args.should_save and staging.exists():
            shutil.rmtree(staging)
        self.accelerator.wait_for_everyone()
        self.save_model(str(staging), _internal_call=True)
        best = self.state.best_global_step
        if best and ((run_dir / f"{PREFIX_CHECKPOINT_DIR}-{best}").exists() or best == self.state.global_step):
            self.state.best_model_checkpoint = str(run_dir / f"{PREFIX_CHECKPOINT_DIR}-{best}")
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
        if self.args.should_save:
            self._export_callback_states()
            self.state.save_to_json(str(staging / STATE_NAME))
            counts = {"supervised": self.token_counts.supervised, "total": self.token_counts.total}
            write_json(staging / COUNTS_NAME, counts)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_checksums(staging)
            if final.exists():
                shutil.rmtree(final)
            os.replace(staging, final)
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(final))
            rotate_checkpoints(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _export_callback_states(self) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if not isinstance(callback, ExportableState):
                continue
            states: Any = self.state.stateful_callbacks  # a dict here, whatever its annotation says
            name = type(callback).__name__
            if isinstance(states.get(name), list):
                states[name].append(callback.state())
            else:
                states[name] = callback.state()


def name_base_model(adapter: Path, name: str) -> None:
    """Let a saved adapter's config and model card call its base model `name`."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    found, config["base_model_name_or_path"] = config["base_model_name_or_path"], name
    write_json(path, config)
    card = adapter / "README.md"
    if card.is_file():
        write_text(card, card.read_text(encoding="utf-8").replace(found, name))


def _word(choice: Any) -> str:
    """An enum's value as a config writes it."""
    return str(getattr(choice, "value", choice))


def restore_counts(trainer: PyralisTrainer, checkpoint: Path) -> None:
    """Go on counting tokens from where the checkpoint was saved (from zero for a checkpoint of another program)."""
    path = checkpoint / COUNTS_NAME
    if not path.is_file():
        return
    counts = read_object(path)
    if counts.keys() != {"supervised", "total"} or not all(isinstance(count, int) for count in counts.values()):
        raise ConfigError(f"{path} is damaged: delete it, and tokens are counted from zero.")
    trainer.token_counts.restore(**counts)


__all__ = ["COUNTS_NAME", "IGNORE_INDEX", "PyralisTrainer", "TokenCounts", "restore_counts"]
