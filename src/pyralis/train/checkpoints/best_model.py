"""`load_best_model_at_end`: the checkpoint of the lowest evaluation loss is there, and is the result."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import Trainer

from pyralis.train.checkpoints.checksums import damage

logger = logging.getLogger(__name__)


class BestModel(Trainer):
    """Trainer that saves whenever an evaluation is the best so far, where the best is to be loaded at the end.

    Trainer itself saves every `save_steps`; with more frequent evaluations the best model of all may never be saved,
    and an earlier one, or none, is taken for it.
    """

    best_loaded: int | None = None
    """The step whose weights the model got at the end of the training; None where it is the last one."""

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        is_new_best = bool(super()._determine_best_metric(*args, **kwargs))
        if is_new_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_new_best

    def _load_best_model(self) -> None:
        """A damaged checkpoint is not loaded: the last model, which is whole, stays, and the log says so."""
        best = Path(str(self.state.best_model_checkpoint))
        if (problem := damage(best)) is not None:
            logger.warning(
                "%s, the best checkpoint, is damaged (%s): the result is the last model instead", best, problem
            )
            return
        super()._load_best_model()
        step = int(best.name.rpartition("-")[2])
        self.best_loaded = step if step < self.state.global_step else None
