"""Where a hand-written backward writes gradients: into `p.grad`, a view of one flat buffer.

`zero_grad` sets `p.grad` to None before each step: then the gradient overwrites its place in the buffer and the view is
bound again. Whatever `p.grad` holds otherwise (the view, DDP's bucket, a tensor of the user's) is added to. A node that
returns None for its parameters has them ready by the time autograd's hooks on them run, which is when DDP reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pyralis.ops.gemm import gemm
from pyralis.ops.lora import LoraGradients
from pyralis.ops.lora_group import LoraGroup

BLOCK = 256  # elements; parameters start at multiples of it, as the flat optimizer has them


class FlatGradients:
    """Views of flat buffers, one buffer per dtype and device, for parameters in a given order.

    views: those of another's buffer (a flat optimizer's), which then needs no copies; by default new ones.
    take: told of each parameter whose gradient is final, as the hooks that autograd calls are; it may use the gradient
    up. A parameter whose one hook it is needs no autograd.
    """

    reusable = True  # whether `target` gives the same places in each backward

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        views: Sequence[Tensor] | None = None,
        take: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.parameters, self.take = tuple(parameters), take
        # Tensors of its own over a given buffer: what is done to one as `p.grad` (`.data =`) leaves its owner's alone.
        made = _new_views(self.parameters) if views is None else [view.view_as(view) for view in views]
        self._views = {id(p): (view, view.data_ptr()) for p, view in zip(self.parameters, made)}

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether it has a gradient that others are added to."""
        return parameter.grad is not None

    def dtype(self, parameter: nn.Parameter) -> torch.dtype:
        """In which its gradient is to be made."""
        return parameter.dtype

    def target(self, parameter: nn.Parameter) -> tuple[Tensor, bool]:
        """(the tensor that is `parameter.grad` from now on, whether to add to it)."""
        if parameter.grad is not None:
            return parameter.grad, True
        view = self.view(parameter)
        parameter.grad = torch.empty_like(parameter) if view is None else view
        return parameter.grad, False

    def serves(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether all of them have a place here."""
        return all(self.view(p) is not None for p in parameters)

    def view(self, parameter: nn.Parameter) -> Tensor | None:
        """Its place in the buffer; None if it has none, or has lost it: `.to()` and `p.grad.data =` move the view."""
        view, place = self._views.get(id(parameter), (None, 0))
        if view is None or view.data_ptr() != place:
            return None
        return view if (view.dtype, view.device) == (parameter.dtype, parameter.device) else None

    def finish(self, parameters: Sequence[nn.Parameter]) -> None:
        """The gradients of these parameters are final."""
        if self.take is not None:
            for parameter in parameters:
                self.take(parameter)

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        grad, add = self.target(parameter)
        if add:
            grad.add_(value)
        else:
            grad.copy_(value)

    def write_sums(self) -> None:
        """Gradients that came in parts are complete. Nothing to do here: they were added in their places."""


def _new_views(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    ends: dict[tuple[torch.dtype, torch.device], int] = {}
    starts = []
    for p in parameters:
        kind = p.dtype, p.device
        starts.append(ends.get(kind, 0))
        ends[kind] = starts[-1] + -(-p.numel() // BLOCK) * BLOCK
    buffers = {(dtype, device): torch.zeros(n, dtype=dtype, device=device) for (dtype, device), n in ends.items()}
    return [buffers[p.dtype, p.device][start : start + p.numel()].view(p.shape) for p, start in zip(parameters, starts)]


def stacked_view(parts: Sequence[Tensor]) -> Tensor | None:
    """One matrix over matrices [N_j, K] that lie under one another in memory; None if they do not."""
    first = parts[0]
    stride = first.stride(0) if first.shape[0] > 1 else first.shape[1]
    end = first.data_ptr()
    for part in parts:
        alike = part.shape[1] == first.shape[1] and part.stride(1) == 1 and part.dtype == first.dtype
        same_rows = part.shape[0] == 1 or part.stride(0) == stride
        if not (alike and same_rows and part.data_ptr() == end):
            return None
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += part.shape[0] * stride * part.element_size()
    rows = sum(part.shape[0] for part in parts)
    return first.detach().as_strided((rows, first.shape[1]), (stride, 1))


@dataclass(frozen=True, slots=True, eq=False)
class TrainedGroup:
    """What is trained of linear layers that share their input; None where a parameter is absent or frozen."""

    weights: tuple[nn.Parameter | None, ...]
    biases: tuple[nn.Parameter | None, ...]
    A: tuple[nn.Parameter | None, ...]
    B: tuple[nn.Parameter | None, ...]
    lora_biases: tuple[nn.Parameter | None, ...]
    magnitudes: tuple[nn.Parameter | None, ...]
    ready: list[Ready] = field(default_factory=list)  # at most one: of the last backward
    reads_input: bool = field(init=False)  # whether the backward needs the layers' input
    reads_product: bool = field(init=False)  # and their product before DoRA's magnitudes

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """In the order in which their gradients stack: each kind together."""
        kinds = (self.weights, self.biases, self.A, self.B, self.lora_biases, self.magnitudes)
        return tuple(p for kind in kinds for p in kind if p is not None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads_input", any(p is not None for p in (*self.weights, *self.A)))
        object.__setattr__(self, "reads_product", any(p is not None for p in self.magnitudes))


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """Buffers that serve again where every parameter has no gradient, or the view that it had then."""

    flat: FlatGradients
    parameters: tuple[nn.Parameter, ...]
    views: tuple[Tensor, ...]
    fresh: GroupGradients
    adding: GroupGradients
    places: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", tuple(view.data_ptr() for view in self.views))

    def holds(self) -> bool:
        """Whether the views lie where they did."""
        return all(view.data_ptr() == place for view, place in zip(self.views, self.places))


class GroupGradients:
    """The buffers of one backward through a group: `lora` for `lora_backward`, then `finish`."""

    @classmethod
    def of(cls, flat: FlatGradients, group: LoraGroup, trained: TrainedGroup, like: Tensor) -> GroupGradients:
        """Those of before if they serve again: a tenth of the time that making them takes."""
        known = trained.ready[0] if trained.ready else None
        if known is not None and known.flat is flat and known.holds():
            if all(p.grad is None for p in known.parameters):
                for p, view in zip(known.parameters, known.views):
                    p.grad = view
                return known.fresh
            if all(p.grad is view for p, view in zip(known.parameters, known.views)):
                return known.adding
        made = cls(flat, group, trained, like)
        if flat.reusable and not made.add and not made.copied and made.bias is None:
            parameters = tuple(p for p in (*trained.A, *trained.B) if p is not None)
            views = tuple(p.grad for p in parameters if p.grad is not None)
            trained.ready[:] = [Ready(flat, parameters, views, made, made.adding())]
        return made

    def __init__(self, flat: FlatGradients, group: LoraGroup, trained: TrainedGroup, like: Tensor) -> None:
        self.flat, self.group, self.trained = flat, group, trained
        wanted = [p for p in (*trained.A, *trained.B) if p is not None]
        held = [flat.holds(p) for p in wanted]
        self.add = any(held)
        targets = {id(p): flat.target(p)[0] for p in wanted}
        if self.add and not all(held):  # one flag serves all: what is new starts from zero
            for p, old in zip(wanted, held):
                if not old:
                    targets[id(p)].zero_()
        dtype = flat.dtype(wanted[0]) if wanted else torch.promote_types(like.dtype, torch.float32)
        A, self.copied = self._stacked_A(targets, dtype, like.device)
        self.bias = None
        if any(p is not None for p in (*trained.biases, *trained.lora_biases)):
            self.bias = torch.zeros(group.out_features, dtype=dtype, device=like.device)
        B = [None if p is None else targets[id(p)] for p in trained.B]
        self.lora = LoraGradients(A, B, self.bias, accumulate=self.add)
        self.without_A = LoraGradients(None, B, self.bias, accumulate=self.add)

    def _stacked_A(
        self, targets: dict[int, Tensor], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor | None, list[tuple[Tensor, slice]]]:
        """(a matrix over the gradients of all A, which of them it has to be copied to afterwards)."""
        group = self.group
        parts = {j: targets[id(p)] for j, p in enumerate(self.trained.A) if p is not None}
        if not parts:
            return None, []
        if len(parts) == len(group.adapted) and (whole := stacked_view(list(parts.values()))) is not None:
            return whole, []
        whole = torch.zeros((group.rank, group.in_features), dtype=dtype, device=device)
        return whole, [(target, group.columns[j]) for j, target in parts.items()]

    def adding(self) -> GroupGradients:
        """The same places, added to."""
        twin = copy.copy(self)
        twin.add, twin.lora = True, replace(self.lora, accumulate=True)
        twin.without_A = replace(self.without_A, accumulate=True)
        return twin

    def weights(self, dy: Tensor, x: Tensor) -> None:
        """dW = dy^T x of trained base weights; dy [T, N], x [T, K]."""
        for rows, weight in zip(self.group.rows, self.trained.weights):
            if weight is not None:
                grad, add = self.flat.target(weight)
                gemm(grad, dy[:, rows].t(), x, 1.0, add)

    def finish(self) -> None:
        """Hand on what did not go straight to its place. Call once `lora` is filled."""
        for target, rows in self.copied:
            assert self.lora.A is not None
            if self.add:
                target.add_(self.lora.A[rows])
            else:
                target.copy_(self.lora.A[rows])
        if self.bias is None:
            return
        for rows, projection, bias, lora_bias in zip(
            self.group.rows, self.group.projections, self.trained.biases, self.trained.lora_biases
        ):
            if bias is not None:
                self.flat.write(bias, self.bias[rows])
            if lora_bias is not None:
                self.flat.write(lora_bias, self.bias[rows] * projection.scale)
