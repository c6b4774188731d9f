"""The order in which a Trainer takes its rows, and which of them."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from pyralis.data.grouped import GroupedSampler


class GroupedRows(Trainer):
    """A Trainer whose `train_sampling_strategy: group_by_length` has no bias (`GroupedSampler`), where a column of the
    rows tells their length (`length_column_name`); other rows and strategies are transformers'."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        arguments = self.args
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        column = arguments.length_column_name
        grouped = arguments.train_sampling_strategy == "group_by_length"
        if not grouped or column not in (getattr(rows, "column_names", None) or ()) or not hasattr(rows, "__len__"):
            return super()._get_train_sampler(train_dataset)
        step_rows = self._train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
        return GroupedSampler(rows.with_format("numpy")[:][column], step_rows, seed)


class EveryRowEvaluated(Trainer):
    """A Trainer whose evaluation sees each row: `dataloader_drop_last`, which transformers obeys there too, leaves out
    rows of training alone. Of data smaller than a batch nothing would be evaluated."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        dropping, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropping
