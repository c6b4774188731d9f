"""A call of a causal LM as a micro-step that can be recorded: its arguments understood, its batch at a bucket."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyralis.engine.buckets import Bucketed, bucket_rows, to_bucket
from pyralis.engine.captured_step import StaticBatch
from pyralis.models.causal_lm import Head, LossRequest, answer_of_decoder
from pyralis.models.detect import Reason
from pyralis.models.fast_path import LAYOUT
from pyralis.models.layout import READ
from pyralis.models.unpadding import can_be_removed

INERT = frozenset({"input_ids", "use_cache", "return_dict", *READ})  # arguments that a recorded step deals with


@dataclass(frozen=True, eq=False)
class RecordableStep:
    """A micro-step at its bucket."""

    causal: Any
    head: Head
    batch: Bucketed
    rows: int | None  # that reach the head
    request: LossRequest

    @property
    def key(self) -> Hashable:
        return self.batch.shape, self.rows, self.request.label_smoothing, self.request.num_items is None

    @property
    def device(self) -> torch.device:
        return self.batch.input_ids.device

    def loss(self, batch: Bucketed | StaticBatch, num_items: Tensor | float | None) -> Tensor:
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.positions, "use_cache": False}
        wanted = LossRequest(batch.targets, num_items, self.request.label_smoothing, self.rows)
        loss: Tensor = answer_of_decoder(self.causal, self.head, {**inputs, LAYOUT: batch.layout}, wanted).loss
        return loss

    def recorded_loss(self, static: StaticBatch) -> Tensor:
        return self.loss(static, static.num_items)


def recordable(causal: Any, head: Head, arguments: Mapping[str, Any], request: LossRequest) -> RecordableStep | Reason:
    """The step, or why it cannot be recorded. arguments: what the decoder is called with."""
    odd = [name for name, value in arguments.items() if value is not None and name not in INERT]
    ids = arguments.get("input_ids")
    if odd or ids is None:
        return Reason(f"the argument {odd[0]} is not recorded" if odd else "no input_ids")
    removable = partial(can_be_removed, causal.model, device=ids.device)
    batch = to_bucket(ids, request.targets, arguments, removable=removable)
    if isinstance(batch, Reason):
        return batch
    rows = bucket_rows(request.supervised_rows, batch.input_ids.numel())
    return RecordableStep(causal, head, batch, rows, request)
