"""AdamW as a torch optimizer, over parameters that are views of one flat buffer: two or three launches a step.

Checkpoints keep the layouts others read: `torch.optim.AdamW`'s with 32-bit states, bitsandbytes' `AdamW8bit`'s with
8-bit ones. Either kind loads into either optimizer here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyralis.engine.flat_parameters import locate
from pyralis.engine.optimizer_state import load_moments, moments_of, new_moments, unwrapped
from pyralis.errors import ConfigError, ModelError
from pyralis.ops.adamw import Groups, State32bit, adamw_step
from pyralis.ops.grad_norm import StepScalars, begin_step

Rounding = Literal["nearest", "stochastic", "split"]


class FlatAdamW(Optimizer):
    """AdamW (decoupled weight decay) over one flat buffer, see `flatten_parameters`.

    bits: 32 or 8 for the states; parameters below `min_8bit_size` elements, and those of `in_32_bits`, keep 32. paged:
    states in managed memory (`engine/paged.py`). max_norm: clip the gradient of all parameters to this norm. rounding:
    of bfloat16 parameters, see `pyralis.ops.adamw`; stochastic bits come from `seed`, the step and the element's place.
    compute_copy: [n], refreshed with the parameters in its own dtype.

    A step whose gradient is not finite changes nothing and is not counted. `grads` [n] is read: a `p.grad` that is not
    a view of it is copied there. A parameter without a gradient is left alone, as by torch, but all count one step.
    Works under `torch.amp.GradScaler`. Everything but `gather` and `sync_groups` may be captured in a CUDA graph.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf, which `update` reads

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 32,
        min_8bit_size: int = 4096,
        in_32_bits: Collection[Tensor] = (),
        paged: bool = False,
        max_norm: float | None = None,
        rounding: Rounding = "nearest",
        seed: int = 0,
        compute_copy: Tensor | None = None,
    ) -> None:
        if bits not in (8, 32):
            raise ConfigError(f"optimizer states have 8 or 32 bits, not {bits}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.parameters: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        layout = self.layout = locate(self.parameters)
        n, device, dtype = layout.values.numel(), layout.values.device, layout.values.dtype
        if rounding != "nearest" and dtype != torch.bfloat16:
            raise ConfigError(f"rounding {rounding!r} is for bfloat16 parameters; these are {dtype}")
        if compute_copy is not None and compute_copy.shape != (n,):
            raise ModelError(f"the compute copy has shape {list(compute_copy.shape)}, expected [{n}] as the buffer")
        self.max_norm, self.compute_copy = max_norm, compute_copy
        self.grads, self.grad_views = self._place_gradients()
        self._places = [p.data_ptr() for p in self.parameters]
        self.scalars = StepScalars.new(device)
        kept = {id(p) for p in in_32_bits}
        wide = [i for i, p in enumerate(self.parameters) if p.numel() < min_8bit_size or id(p) in kept]
        self.moments = new_moments(layout, bits, wide, paged=paged)
        self._seed = torch.tensor([seed], dtype=torch.int64, device=device) if rounding == "stochastic" else None
        split = rounding == "split"
        self._low_bits = torch.zeros(n, dtype=torch.int16, device=device) if split else None
        self._rates: list[list[float]] = []
        self._absent: frozenset[int] = frozenset()
        count = len(self.param_groups)
        index = self._group_index().to(device)
        self._groups = Groups(torch.zeros(count, device=device), torch.zeros(count, device=device), index)
        self.sync_groups()
        for i, p in enumerate(self.parameters):
            self.state[p] = self._state_of(i)

    def _place_gradients(self) -> tuple[Tensor, list[Tensor]]:
        """(a buffer for gradients, the view in it of each parameter's)."""
        grads = torch.zeros_like(self.layout.values)
        return grads, [grads[self.layout.part(i)].view(p.shape) for i, p in enumerate(self.parameters)]

    @property
    def grad_norm(self) -> Tensor:
        """[] float32 on the device: the last step's gradient norm, before clipping."""
        return self.scalars.norm

    @property
    def skipped(self) -> Tensor:
        """[] float32 on the device: 1 if the last step was skipped, its gradient not being finite."""
        return self.scalars.skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "moments"):
            raise ConfigError("FlatAdamW takes all its parameters when it is made; make a new one")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.gather():
            self.sync_groups()
            self.update()
        return loss

    def gather(self) -> bool:
        """Bring gradients that lie elsewhere into `grads`; False if no parameter has one.

        Raises ModelError if a parameter has left the flat buffer: its updates would be lost.
        """
        absent = self._bring(range(len(self.parameters)))
        if len(absent) == len(self.parameters):
            return False
        if absent != self._absent:
            for i in absent:
                self.grad_views[i].zero_()
            self._leave_alone(absent)
        return True

    def _bring(self, parameters: Iterable[int]) -> frozenset[int]:
        """Copy the gradients of these parameters that lie elsewhere; returns which parameters have none."""
        targets, sources, absent = [], [], []
        for i in parameters:
            self._check_place(i)
            p, view = self.parameters[i], self.grad_views[i]
            if p.grad is None:
                absent.append(i)
            elif p.grad.data_ptr() != view.data_ptr():
                targets.append(view)
                sources.append(p.grad)
        if targets:
            torch._foreach_copy_(targets, sources)
        return frozenset(absent)

    def _check_place(self, i: int) -> None:
        p = self.parameters[i]
        if p.data_ptr() != self._places[i]:
            raise ModelError(
                f"parameter {i} of shape {list(p.shape)} was moved out of the optimizer's flat buffer (by .to(), "
                ".half() or `.data =`) after the optimizer was made; make the optimizer again"
            )

    def _leave_alone(self, absent: frozenset[int]) -> None:
        """Update all parameters but these from now on."""
        self._absent = absent
        assert self._groups.index is not None
        self._groups.index.copy_(self._group_index())

    def sync_groups(self) -> None:
        """Send learning rates and weight decays to the device if they changed since the last time."""
        rates = [[float(group[key]) for group in self.param_groups] for key in ("lr", "weight_decay")]
        if rates != self._rates:
            self._rates = rates
            self._groups.lr.copy_(torch.tensor(rates[0]))
            self._groups.weight_decay.copy_(torch.tensor(rates[1]))

    def update(self) -> None:
        """The launches of a step: the gradient's norm, its scalars, the update. No value visits the CPU."""
        (beta1, beta2), eps = self._settings()
        given = self.__dict__
        begin_step(
            self.grads, self.scalars, beta1=beta1, beta2=beta2, max_norm=self.max_norm,
            grad_scale=given.get("grad_scale"), found_inf=given.get("found_inf"),
        )  # fmt: skip
        adamw_step(
            self.layout.values, self.grads, self.moments, self.scalars, self._groups, beta1=beta1, beta2=beta2, eps=eps,
            compute_copy=self.compute_copy, seed=self._seed, low_bits=self._low_bits,
        )  # fmt: skip

    def _settings(self) -> tuple[tuple[float, float], float]:
        found = {(tuple(group["betas"]), group["eps"]) for group in self.param_groups}
        if len(found) > 1:
            raise ConfigError("all parameter groups of FlatAdamW share betas and eps; lr and weight_decay may differ")
        ((beta1, beta2), eps) = found.pop()
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and eps >= 0 and math.isfinite(eps)):
            raise ConfigError(f"betas {beta1}, {beta2} must be in [0, 1) and eps {eps} at least 0")
        return (beta1, beta2), eps

    def _group_index(self) -> Tensor:
        """[B] int32 on the CPU: the group of each block, -1 where no parameter lies or it has no gradient."""
        index, i = torch.full((self.layout.blocks,), -1, dtype=torch.int32), 0
        for number, group in enumerate(self.param_groups):
            for _ in group["params"]:
                if i not in self._absent:
                    index[self.layout.block_part(i)] = number
                i += 1
        return index

    def _state_of(self, i: int) -> dict[str, Any]:
        """Views of parameter i's states, and what counts its steps."""
        shape = self.parameters[i].shape
        state: dict[str, Any] = {"step": self._scalars_of(i).step}
        if self._low_bits is not None:
            state["low_bits"] = self._low_bits[self.layout.part(i)].view(shape)
        return {**state, **moments_of(self.moments, self.layout, i, shape)}

    def _scalars_of(self, i: int) -> StepScalars:
        return self.scalars

    def state_dict(self) -> dict[str, Any]:
        """In the layout of torch's AdamW (`exp_avg`, ...); with 8 bits, of bitsandbytes' (`state1`, `absmax1`, ...)."""
        saved = super().state_dict()
        as_torch = isinstance(self.moments, State32bit)  # which counts in place: a tensor for each parameter
        saved["state"] = {
            i: {**state, "step": torch.tensor(float(state["step"])) if as_torch else int(state["step"])}
            for i, state in saved["state"].items()
        }
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` of this class, of torch's AdamW or of bitsandbytes' AdamW8bit gave.

        Raises ModelError if it is for other parameters, ConfigError if their steps differ.
        """
        saved_groups = state_dict["param_groups"]
        ours, theirs = ([len(group["params"]) for group in groups] for groups in (self.param_groups, saved_groups))
        if ours != theirs:
            raise ModelError(f"the optimizer's checkpoint has groups of {theirs} parameters; this run has {ours}")
        keys = [key for group in saved_groups for key in group["params"]]
        states = [unwrapped(state_dict["state"].get(key, {})) for key in keys]
        self._count_from([int(state["step"]) if state else None for state in states])
        load_moments(self.moments, self.layout, [self.state[p] for p in self.parameters], states)
        for group, saved in zip(self.param_groups, saved_groups):
            group.update({key: value for key, value in saved.items() if key != "params"})
        self.sync_groups()

    def _count_from(self, steps: list[int | None]) -> None:
        """Go on from the steps that the parameters have taken; None for those without a state."""
        set_step(self.scalars, {step for step in steps if step is not None})


def set_step(scalars: StepScalars, steps: set[int]) -> None:
    """Raises ConfigError if there are several."""
    if len(steps) > 1:
        raise ConfigError(
            f"parameters in the checkpoint have taken {sorted(steps)} steps; one step is counted for all of them here"
        )
    scalars.step.fill_(steps.pop() if steps else 0)
