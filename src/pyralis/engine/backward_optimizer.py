"""AdamW whose step is taken in the backward: parts of a model are updated, and their gradients given up, as these come.

A part is a run of parameters that lie side by side in the flat buffer, such as a decoder layer's, or a single one. The
gradients of layers take turns in one buffer as large as the largest of them: a model's gradients are never all held.
In exchange nothing can be accumulated, since every backward is a step, and there is no norm of all gradients to clip
by when the first update is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pyralis.engine.flat_parameters import FlatLayout
from pyralis.engine.optimizer import FlatAdamW, set_step
from pyralis.errors import ConfigError, ModelError
from pyralis.ops.adamw import Groups, adamw_step
from pyralis.ops.adamw_8bit import BLOCK
from pyralis.ops.grad_norm import StepScalars, begin_step


@dataclass(eq=False)
class Part:
    """Parameters that are updated together, by their numbers; what they take up in the buffer; what is not theirs."""

    members: tuple[int, ...]  # in the buffer's order
    elements: slice
    blocks: slice
    gaps: list[slice]  # of elements between them, counted from the part's first
    scalars: StepScalars
    missing: set[int] = field(init=False)  # whose gradients have not come since the last update

    def __post_init__(self) -> None:
        self.missing = set(self.members)

    @property
    def size(self) -> int:
        return int(self.elements.stop - self.elements.start)


class BackwardAdamW(FlatAdamW):
    """`FlatAdamW` without `max_norm` and GradScaler whose update is made by the backward; `step` only finishes it.

    parts: parameters that are updated together; they have to lie side by side in the flat buffer. Every other one is a
    part of its own. `take` is told of each gradient: by hooks on the parameters between `attach` and `detach`, or by a
    fused layer (`FlatGradients`).

    The update is that of `FlatAdamW`, bit by bit, with one difference: where a gradient is not finite its part is left
    as it is and does not count the step, not the whole model.
    """

    _step_supports_amp_scaling = False

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], *args: Any, parts: Sequence[Sequence[Tensor]] = (),
        **settings: Any,
    ) -> None:  # fmt: skip
        if settings.get("max_norm"):
            raise ConfigError(
                f"max_norm is {settings['max_norm']}, but an optimizer that steps in the backward cannot clip: the "
                "norm of all gradients is known only when the first of them are gone. Set max_norm to None."
            )
        self._wanted = [[id(p) for p in part] for part in parts if part]
        self._updated: list[Part] = []
        self._stepped = False
        self._hooks: list[RemovableHandle] = []
        super().__init__(params, *args, **settings)

    def _place_gradients(self) -> tuple[Tensor, list[Tensor]]:
        self._numbers = {id(p): i for i, p in enumerate(self.parameters)}
        wanted = [[self._numbers[key] for key in part] for part in self._wanted]
        inside = {i for part in wanted for i in part}
        wanted += [[i] for i in range(len(self.parameters)) if i not in inside]
        device = self.layout.values.device
        self.parts = [_part(self.layout, members, StepScalars.new(device)) for members in wanted]
        self._part_of = {i: part for part in self.parts for i in part.members}
        largest = max((part.size for part in self.parts if len(part.members) > 1), default=0)
        grads = torch.zeros(largest, dtype=self.layout.values.dtype, device=device)
        views = []
        for i, p in enumerate(self.parameters):
            part, start = self._part_of[i], self.layout.offsets[i] - self._part_of[i].elements.start
            alone = len(part.members) == 1  # autograd's own tensor serves
            views.append(grads[:0] if alone else grads[start : start + p.numel()].view(p.shape))
        return grads, views

    @property
    def placed(self) -> tuple[list[Any], list[Tensor]]:
        """(parameters of parts of several, where a backward is to write their gradients)."""
        members = [i for part in self.parts if len(part.members) > 1 for i in part.members]
        return [self.parameters[i] for i in members], [self.grad_views[i] for i in members]

    @property
    def grad_norm(self) -> Tensor:
        """[] float32 on the device: the norm of all gradients of the last backward."""
        norms = [part.scalars.norm for part in self._updated]
        return torch.stack(norms).norm() if norms else self.scalars.norm

    @property
    def skipped(self) -> Tensor:
        """[] float32 on the device: 1 if a part was left as it was in the last backward."""
        flags = [part.scalars.skip for part in self._updated]
        return torch.stack(flags).amax() if flags else self.scalars.skip

    @torch.no_grad()
    def take(self, parameter: Tensor) -> None:
        """The gradient of `parameter` is final: update its part if it was the last of them."""
        i = self._numbers[id(parameter)]
        part = self._part_of[i]
        part.missing.discard(i)
        if not part.missing:
            self._update(part)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parts that lack gradients of some parameters. These are left alone, but count the step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            if len(part.missing) < len(part.members):
                self._update(part)
        if self._updated and not self._stepped:
            (beta1, beta2), _ = self._settings()
            for part in set(self.parts) - set(self._updated):
                begin_step(self.layout.values, part.scalars, beta1=beta1, beta2=beta2, measure=False)
        self._stepped = True
        return loss

    def attach(self) -> None:
        """Every backward is a step from now on."""
        if not self._hooks:
            self._hooks = [p.register_post_accumulate_grad_hook(self.take) for p in self.parameters]

    def detach(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _update(self, part: Part) -> None:
        if self._stepped:
            self._updated, self._stepped = [], False
        self.sync_groups()
        grads = self._gradients_of(part)
        (beta1, beta2), eps = self._settings()
        begin_step(grads, part.scalars, beta1=beta1, beta2=beta2)
        elements = slice(part.elements.start, part.elements.start + len(grads))
        index = self._groups.index
        assert index is not None
        adamw_step(
            self.layout.values[elements], grads, self.moments.part(elements, part.blocks), part.scalars,
            Groups(self._groups.lr, self._groups.weight_decay, index[part.blocks]),
            beta1=beta1, beta2=beta2, eps=eps, seed=self._seed, first_block=part.blocks.start,
            compute_copy=None if self.compute_copy is None else self.compute_copy[elements],
            low_bits=None if self._low_bits is None else self._low_bits[elements],
        )  # fmt: skip
        self._updated.append(part)
        part.missing = set(part.members)
        for i in part.members:
            self.parameters[i].grad = None

    def _gradients_of(self, part: Part) -> Tensor:
        """[size of the part]: its gradients, with zeros where there are none."""
        if len(part.members) == 1:
            (i,) = part.members
            self._check_place(i)
            grad = self.parameters[i].grad
            assert grad is not None
            absent: frozenset[int] = frozenset()
            grads = grad.to(self.layout.values.dtype).reshape(-1)
        else:
            absent, grads = self._bring(part.members), self.grads[: part.size]
            for gap in part.gaps:
                grads[gap].zero_()
            for i in absent:
                self.grad_views[i].zero_()
        if (left := self._absent - set(part.members) | absent) != self._absent:
            self._leave_alone(left)
        return grads

    def _scalars_of(self, i: int) -> StepScalars:
        return self._part_of[i].scalars

    def _count_from(self, steps: list[int | None]) -> None:
        for part in self.parts:
            set_step(part.scalars, {step for i in part.members if (step := steps[i]) is not None})


def _part(layout: FlatLayout, members: Sequence[int], scalars: StepScalars) -> Part:
    """Raises ModelError if other parameters lie between the members."""
    members = sorted(members, key=layout.offsets.__getitem__)
    first, last = members[0], members[-1]
    start, end = layout.offsets[first], layout.offsets[last] + layout.sizes[last]
    others = set(range(len(layout.offsets))) - set(members)
    if any(start < layout.offsets[i] < end for i in others):
        raise ModelError(f"parameters {members} are to be updated together, but others lie between them in the buffer")
    if len(members) > 1:
        end = min(-(-end // BLOCK) * BLOCK, layout.values.numel())
    gaps, at = [], start
    for i in members:
        gaps.append(slice(at - start, layout.offsets[i] - start))
        at = layout.offsets[i] + layout.sizes[i]
    gaps.append(slice(at - start, end - start))
    blocks = slice(start // BLOCK, -(-end // BLOCK))
    return Part(tuple(members), slice(start, end), blocks, [gap for gap in gaps if gap.start < gap.stop], scalars)
