"""Hugging Face's Trainer without the CPU time that it spends around a micro-step, and without waiting for the GPU.

With 32 layers and PEFT a model is 2,700 modules. Trainer walks them in each micro-step to switch them to training and
to count parameters, and in each optimizer step to clip and to clear gradients: 17 ms on a fast CPU, 32 on a slow one.
It also reads each loss, to leave a NaN out of the mean. Here all of that is done as before, only faster. Nothing is
assumed about the modules: they are looked at each time, in a loop that costs 0.4 ms.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from pyralis.engine.backward_optimizer import BackwardAdamW
from pyralis.engine.flat_parameters import take_back, to_host
from pyralis.engine.optimizer import FlatAdamW, Rounding
from pyralis.engine.step_graphs import CudaGraph, step_graphs
from pyralis.errors import ConfigError
from pyralis.train.device_fit import check_gpu
from pyralis.train.embedding_rate import embedding_parameters, give_learning_rate
from pyralis.train.flat_optimizer import flat_optimizer, steps_in_backward, trains_base
from pyralis.train.full_weights import check_steps_in_backward
from pyralis.train.loss_scaling import warn_of_lost_gradients
from pyralis.train.module_walk import all_training, parameters_of
from pyralis.train.old_trainer_names import say_once
from pyralis.train.out_of_memory import retried


class LeanTrainer(Trainer):
    """Trainer with the same results for less. A class of its own, to stand before TRL's trainers as well.

    - `train()` of a model all of whose modules are training does nothing; `eval()` of any of them is noticed.
    - A loss that is not finite is left out of the mean on the device (`logging_nan_inf_filter`), so nothing waits.
    - Parameters are counted once a run for the count of floating-point operations.
    - Gradients are clipped and cleared without walking through the modules' methods.
    - AdamW is one launch a step where that is the same arithmetic (`flat_optimizer`), its clipping included. Weights in
      bfloat16 it updates without losing what rounding to nearest does (`bf16_update`).
    - On a GPU the steps of a fast model are replayed from CUDA graphs (`cuda_graph`).
    - Batches are copied to a GPU without waiting where they are in pinned memory.
    - A micro-batch that does not fit is computed again under a more frugal memory plan (`out_of_memory.py`).
    - TRL's telemetry is off.
    """

    _filters_losses = False
    _flops_per_token: float | None = None
    _run: ExitStack | None = None
    _settled = True
    step_graphs_summary: str | None = None  # of the last run's recorded steps

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.embedding_learning_rate: float | None = getattr(self.args, "embedding_learning_rate", None)
        self.bf16_update: Rounding = getattr(self.args, "bf16_update", "split")
        self.optimizer_in_bwd: bool = getattr(self.args, "optimizer_in_bwd", False)
        self.cuda_graph: CudaGraph = getattr(self.args, "cuda_graph", "auto")

    def _send_telemetry(self) -> None:
        """Of TRL's trainers: nothing is sent."""

    def create_accelerator_and_postprocess(self) -> None:
        check_gpu(self.args, getattr(self, "model", None))
        if self.args.n_gpu > 1:
            # Trainer would copy the model to each GPU in each step (nn.DataParallel), or if its weights are quantised
            # multiply the batch by the number of GPUs and train on one of them.
            say_once(
                f"{self.args.n_gpu} GPUs are visible, and this process trains on one of them. On all: `pyralis train "
                f"CONFIG --gpus {self.args.n_gpu}`, or a script by `torchrun --nproc_per_node {self.args.n_gpu}`."
            )
            self.args._n_gpu = 1
        if self.args.dataloader_pin_memory and self.args.device.type == "cuda":
            # A blocking copy waits for all that was launched before it; from pinned memory none is needed.
            config: Any = copy.copy(self.args.accelerator_config)
            config.non_blocking = True
            self.args.accelerator_config = config
        super().create_accelerator_and_postprocess()

    # ---- a run ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._flops_per_token = self.step_graphs_summary = None
        warn_of_lost_gradients(self.accelerator.mixed_precision, self._trained)
        with self._loss_filter(False):
            self._filters_losses = self._wanted_filter
            try:
                with ExitStack() as self._run:
                    graphs = None
                    if self._is_replicated and self.args.n_gpu <= 1 and not self.args.torch_compile:
                        graphs = self._run.enter_context(step_graphs(self._trained, self.cuda_graph))
                    result = super().train(*args, **kwargs)
                    self.step_graphs_summary = None if graphs is None else graphs.summary
                    return result
            finally:
                self._run = None
                self._filters_losses = False
                for method in LEAN_METHODS:
                    vars(self.model_wrapped).pop(method, None)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._loss_filter(self._filters_losses or self.args.logging_nan_inf_filter):
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def _loss_filter(self, on: bool) -> Iterator[None]:
        """`args.logging_nan_inf_filter`, for a while. Trainer reads it after each micro-step and each evaluation."""
        self._wanted_filter = self.args.logging_nan_inf_filter
        wanted = self._wanted_filter
        self.args.logging_nan_inf_filter = on
        try:
            yield
        finally:
            self.args.logging_nan_inf_filter = wanted

    # ---- a micro-step ----

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        for name, method in LEAN_METHODS.items():
            if name not in vars(model):
                vars(model)[name] = method(model)
        if not self._settled and (flat := self._flat_optimizer) is not None:
            take_back(flat.parameters, flat.layout)  # accelerate's `model.to("cpu:0")` copies a model on the CPU
            self._settled = True
        step = partial(super().training_step, model, *args, **kwargs)
        loss: Tensor = step() if self.optimizer_in_bwd else retried(
            model, step, self.optimizer, self.args.gradient_accumulation_steps
        )  # fmt: skip
        return self._filtered(loss) if self._filters_losses else loss

    def _filtered(self, loss: Tensor) -> Tensor:
        """The loss, or where it is not finite the mean since the last log line, as Trainer has it, without reading."""
        steps = 1 + self.state.global_step - self._globalstep_last_logged
        return torch.where(torch.isfinite(loss), loss, (self._tr_loss / steps).to(loss.dtype))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        tokens = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if not isinstance(tokens, Tensor) or not tokens.numel():
            return super().floating_point_ops(inputs)
        if self._flops_per_token is None:
            self._flops_per_token = super().floating_point_ops(inputs) / tokens.numel()
        return round(self._flops_per_token * tokens.numel())

    # ---- an optimizer step ----

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's, with a learning rate of their own for embeddings and head if they have one; or the flat one in its
        place."""
        trained = self._trained
        if self.optimizer is None:
            if self.optimizer_in_bwd:
                check_steps_in_backward(self.args, self._is_replicated)
            optimizer = super().create_optimizer(model)
            if self.embedding_learning_rate is not None:
                give_learning_rate(optimizer, embedding_parameters(trained), self.embedding_learning_rate)
            if self._is_replicated and self.optimizer_cls_and_kwargs is None:
                self.optimizer = flat_optimizer(
                    optimizer, trained, self.args.max_grad_norm, rounding=self.bf16_update, seed=self.args.seed,
                    in_backward=self.optimizer_in_bwd,
                )  # fmt: skip
        if self.optimizer_in_bwd and not isinstance(self._flat_optimizer, BackwardAdamW):
            raise ConfigError("optimizer_in_bwd: the optimizer given to the trainer cannot step in the backward.")
        if self._run is not None:
            self._run.enter_context(steps_in_backward(self._flat_optimizer, trained))
        self._settled = False
        return self.optimizer

    @property
    def _trained(self) -> nn.Module:
        model: Any = self.model
        return model  # type: ignore[no-any-return]

    @property
    def _flat_optimizer(self) -> FlatAdamW | None:
        """The optimizer, inside accelerate's wrapper, if it is a flat one."""
        flat = getattr(self.optimizer, "optimizer", self.optimizer)
        return flat if isinstance(flat, FlatAdamW) else None

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The norm of the gradient before clipping, on the device."""
        if (flat := self._flat_optimizer) is not None:
            return flat.grad_norm  # it clips in its step, and fills this in; Trainer reads it afterwards
        parameters = [p for p in parameters_of(model) if p.grad is not None]
        if not parameters or any(type(p.grad) is not Tensor for p in parameters) or not self._is_replicated:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._flat_optimizer is not None:
            return self._clip_grad_norm(model)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights that are views of one buffer go by way of the host: transformers would clone them all on the GPU."""
        flat, model = self._flat_optimizer, self._trained
        if state_dict is None and flat is not None and flat.layout.values.is_cuda and trains_base(model):
            state_dict = to_host(model.state_dict())
        super()._save(output_dir, state_dict)

    @property
    def _is_replicated(self) -> bool:
        """Whether each process has the whole model."""
        return not (self.is_deepspeed_enabled or self.is_fsdp_enabled)


class _TrainMode:
    """`module.train` of one module. Looked at when called, so that nobody's `eval()` is missed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        if mode and all_training(self.module):
            return self.module
        return type(self.module).train(self.module, mode)


class _ZeroGrad:
    """`module.zero_grad` of one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, set_to_none: bool = True) -> None:
        if not set_to_none or type(self.module).zero_grad is not nn.Module.zero_grad:
            type(self.module).zero_grad(self.module, set_to_none)
            return
        for parameter in parameters_of(self.module):
            if parameter.grad is not None:
                parameter.grad = None


# Attributes of the model's instance while it is trained by a LeanTrainer. They are objects that hold the module, not
# closures: a copy of the model that somebody makes meanwhile has its own.
LEAN_METHODS = {"train": _TrainMode, "zero_grad": _ZeroGrad}
