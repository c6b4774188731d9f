"""`pyralis.DPOTrainer`: TRL's, with chosen and rejected in one fast forward without padding and without stored logits.

What differs from TRL's is how the log-probabilities are computed. Arguments, data preparation, losses, logged metrics
and callbacks are TRL's; older arguments are taken too (`old_trainer_names.py`). What is not served here goes to TRL's
own loss, and the reason is said once.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import trl
from peft import PeftModel
from torch import Tensor, nn
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import create_model_from_path

from pyralis.data.pairs import PairCollator, PairLayout
from pyralis.models.causal_lm import head_reason
from pyralis.models.shared_prompts import sharing_reason
from pyralis.models.surgery import accelerate, report
from pyralis.models.swap import fast_modules
from pyralis.train.old_trainer_names import TrainerCall, say_once
from pyralis.train.preference.dpo_loss import LOSSES, DPOLoss
from pyralis.train.preference.dpo_metrics import PreferenceMetrics
from pyralis.train.preference.dpo_reference import Reference
from pyralis.train.preference.dpo_step import PreferenceStep
from pyralis.train.trl_trainer import TrlConfig, TrlTrainer


@dataclass
class DPOConfig(TrlConfig, trl.DPOConfig):
    """`trl.DPOConfig` with fields of ours. `bf16` defaults to what the device computes in."""

    share_prompts: bool = field(
        default=True, metadata={"help": "Compute the prompt of a pair once, where the model's attention can."}
    )
    token_metrics: bool = field(
        default=True,
        metadata={"help": "Log entropy, mean logits and token accuracy, some passes over the answers' logits."},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Prompts keep so many of their last tokens, as in TRL before 1.0."}
    )
    rpo_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the chosen answers' negative log-probability, beside the losses of loss_type."},
    )


class DPOTrainer(TrlTrainer, trl.DPOTrainer):
    """`trl.DPOTrainer` on the fast path; arguments as of TRL, today's or older ones."""

    trl_trainer = trl.DPOTrainer
    trl_config = DPOConfig

    def __init__(self, *positional: Any, **given: Any) -> None:
        self._step: PreferenceStep | None = None
        self._settled = False
        self._collected: dict[str, PreferenceMetrics] = {}
        super().__init__(*positional, **given)
        self._settle()

    def adapt(self, call: TrainerCall) -> tuple[str, ...]:
        """A fully trained model gets a copy of itself as reference. TRL would load the checkpoint anew, too late for
        the fast path."""
        args, given = call.args, call.arguments
        if isinstance(args.loss_type, str):
            args.loss_type = [args.loss_type]
        if args.rpo_alpha is not None:
            args.loss_weights = [*(args.loss_weights or [1.0] * len(args.loss_type)), args.rpo_alpha]
            args.loss_type = [*args.loss_type, "sft"]
        adapted = isinstance(given.get("model"), PeftModel) or given.get("peft_config") is not None
        if given.get("ref_model") is None and not adapted and not args.precompute_ref_log_probs:
            if isinstance(given["model"], str):
                given["model"] = _load(given["model"], args, given.pop("quantization_config", None))
            given["ref_model"] = copy.deepcopy(given["model"]).eval().requires_grad_(False)
        reference = given.get("ref_model")
        if reference is not None and args.acceleration != "off" and next(fast_modules(reference), None) is None:
            accelerate(reference)
        return ()

    # ---- what is served ----

    def _settle(self) -> None:
        """Decide how batches are computed; TRL's own precomputing, inside its constructor, may need it first."""
        if self._settled:
            return
        self._settled = True
        if (reason := self._why_not()) is not None:
            say_once(f"DPOTrainer: TRL's own loss is used: {reason}")
            return
        args: Any = self.args
        model: Any = self.model
        loss = DPOLoss(
            tuple(self.loss_types), self.beta, tuple(self.loss_weights), self.label_smoothing, args.discopop_tau
        )
        self._step = PreferenceStep(Reference(model, self.ref_model, self.ld_alpha), loss, args.token_metrics)
        self._collected = {mode: PreferenceMetrics(self.beta) for mode in ("train", "eval")}
        collator: Any = self.data_collator
        self.data_collator = PairCollator(
            collator.pad_token_id, self._layout(), collator.max_length, collator.truncation_mode,
            collator.pad_to_multiple_of,
        )  # fmt: skip

    def _why_not(self) -> str | None:
        """Why TRL's own loss has to be used; None if it has not."""
        args: Any = self.args
        peft = self.model.active_peft_config if isinstance(self.model, PeftModel) else None
        unknown = [name for name in self.loss_types if name not in LOSSES]
        checks = (
            (self._is_vision_dataset, "the data has images"),
            (bool(unknown), f"loss_type {', '.join(unknown)}"),
            (self.f_divergence_type != "reverse_kl", f"f_divergence_type {self.f_divergence_type}"),
            (self.use_weighting, "use_weighting"),
            (self.aux_loss_enabled, "a mixture of experts with a loss for its router"),
            (self.is_deepspeed_enabled or self.is_fsdp_enabled, "the model is sharded"),
            (self.accelerator.parallelism_config is not None, "a parallelism_config"),
            (args.torch_compile, "torch_compile"),
            (args.use_liger_kernel, "use_liger_kernel"),
            (self.compute_metrics is not None, "compute_metrics reads logits"),
            (peft is not None and peft.is_prompt_learning, "a learnt prompt"),
            (type(self.data_collator) is not DataCollatorForPreference, "a data_collator of your own"),
        )
        for holds, reason in checks:
            if holds:
                return reason
        return next((str(found) for model in self._models() if (found := head_reason(model)) is not None), None)

    def _models(self) -> list[Any]:
        return [model for model in (self.model, self.ref_model) if model is not None]

    def _layout(self) -> PairLayout:
        found = [report(model) for model in self._models()]
        if any(one.fast_layers < len(one.layers) for one in found):
            return "padded"
        args: Any = self.args
        if not args.share_prompts:
            return "packed"
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        reasons = [reason for model in self._models() if (reason := sharing_reason(model, dtype)) is not None]
        if reasons:
            say_once(f"DPOTrainer: prompts are computed once for each answer: {reasons[0]}")
        return "packed" if reasons else "shared"

    # ---- data ----

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if args.max_prompt_length is None:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        whole = copy.copy(args)
        whole.max_length = None  # else rows would be dropped for prompts that are cut here
        dataset = super()._prepare_dataset(dataset, processing_class, whole, dataset_name)
        dataset = dataset.map(partial(_cut_prompt, length=args.max_prompt_length))
        if args.max_length is None or args.truncation_mode != "keep_start":
            return dataset
        return dataset.filter(partial(_has_room, length=args.max_length))

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._settle()
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: nn.Module, inputs: Any) -> Any:
        if self._step is None:
            return super().compute_ref_log_probs(model, inputs)
        inputs = self._prepare_inputs(inputs)
        with self.accelerator.autocast():
            return self._step.reference.compute(inputs).chunk(2)

    # ---- loss and metrics ----

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean of the pairs' losses. With `return_outputs` there are no outputs: logits are never made."""
        if self._step is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        result = self._step(model, inputs)
        self._collected[self._mode].add(inputs, result.scores, result.tokens)
        loss = result.losses.mean()
        return (loss, None) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        return super().prediction_step(model, inputs, prediction_loss_only or self._step is not None, ignore_keys)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = self._mode
        collected = self._collected.get(mode)
        if collected is not None:
            seen = collected.tokens_seen(self._summed)
            if mode == "train":
                self._total_train_tokens += seen
            means = collected.take(self._summed)
            if means:
                self._metrics[mode] = defaultdict(list, {name: [value] for name, value in means.items()})
                self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)

    @property
    def _mode(self) -> str:
        model: Any = self.model
        return "train" if model.training else "eval"

    def _summed(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")


def _load(name: str, args: Any, quantization_config: Any) -> nn.Module:
    """As TRL does."""
    settings = dict(args.model_init_kwargs or {})
    args.model_init_kwargs = None
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        settings["device_map"] = None
    settings.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(name, **settings)


def _cut_prompt(example: dict[str, Any], length: int) -> dict[str, Any]:
    return {"prompt_ids": example["prompt_ids"][-length:]}


def _has_room(example: dict[str, Any], length: int) -> bool:
    return len(example["prompt_ids"]) < length
