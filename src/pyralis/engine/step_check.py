"""A recorded step against the same micro-batch run kernel by kernel: the loss, and the gradient of everything trained.

Gradients are compared by their norms and by elements spread over each tensor (all of them up to `SAMPLE`, which LoRA's
mostly are), so that no second copy of a whole model's gradients is needed. Kernels, shapes and dropout masks are the
same in both, so what differs is the order in which a GPU's atomics add up; what a recorded step may do wrong (memory
that was another's, values of another step) is as large as the gradients themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pyralis.engine.step_gradients import StepGradients

SAMPLE = 1 << 16  # elements of a tensor that are compared one by one
# Relative differences of gradients that are rounding, by the dtype of products: some units in the last place.
LIMITS = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
LIMIT = 1e-3  # of float32, whose products may be in TF32
LOSS_SHARE = 0.5  # of these limits, for losses
LEAST_LOSS = 0.05  # smaller ones are compared as if they were so large
LEAST_NORM = 1e-2  # of the root mean square of all norms, likewise


@dataclass(frozen=True, eq=False)
class Measured:
    """What a micro-step came to, on the device."""

    loss: Tensor  # []
    norms: Tensor  # [parameters] float32
    samples: tuple[Tensor, ...]  # float32

    def tells(self) -> bool:
        """Whether anything can be compared with it: all is finite, and something is learnt. Waits for the device."""
        total = float(self.norms.sum())
        return math.isfinite(total) and total > 0 and math.isfinite(float(self.loss))


@dataclass(frozen=True, slots=True)
class Checked:
    """How far a recorded step is from the same step run: relative differences, and what was allowed.

    bucket: of the loss, between the batch as it came and at its bucket; 0 where dropout's masks are other ones.
    tensor: whose gradient differs most.
    """

    loss: float
    bucket: float
    gradient: float
    tensor: str
    limit: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.1e} and gradients at most {self.gradient:.1e} from those of the same step launched "
            f"kernel by kernel, padding moves the loss by {self.bucket:.1e}"
        )

    @property
    def fault(self) -> str | None:
        """What is too far from being equal, if anything. NaN is."""
        allowed = f"expected at most {self.limit:.1e}"
        if not self.gradient <= self.limit:
            return f"the gradient of {self.tensor} differs by {self.gradient:.1e}, {allowed}"
        allowed = f"expected at most {self.limit * LOSS_SHARE:.1e}"
        for value, what in ((self.loss, "its loss"), (self.bucket, "the loss of the batch at its padded length")):
            if not value <= self.limit * LOSS_SHARE:
                return f"{what} differs by {value:.1e}, {allowed}"
        return None


def summary_of(checks: Sequence[Checked], replays: int, over: object | None) -> str:
    """One line on the checks of a run and what came of them. over: why recorded steps were given up, if they were."""
    largest = max(checks, key=lambda one: one.gradient)
    worst = replace(largest, loss=max(c.loss for c in checks), bucket=max(c.bucket for c in checks))
    end = "" if over is None else f"; given up: {over}"
    return f"{replays} micro-steps replayed from CUDA graphs; recorded steps checked, {len(checks)}: {worst}{end}"


def measured(gradients: StepGradients, run: Callable[[], Tensor]) -> Measured:
    """What `run` comes to: a forward and backward that returns its loss. Gradients accumulated so far stay."""
    with gradients.aside():
        loss = run().detach().clone()
        places = gradients.places
        norms = torch.stack([torch.linalg.vector_norm(view, dtype=torch.float32) for view in places])
        return Measured(loss, norms, tuple(map(_sample, places)))


def compared(
    run: Measured, replayed: Measured, plain: Tensor | None, parameters: Sequence[nn.Parameter],
    names: Mapping[int, str], dtype: torch.dtype,
) -> Checked:  # fmt: skip
    """Waits for the device, once.

    Args:
        plain: the loss of the batch as it came; None if it cannot be compared.
        names: of the parameters, by `id`.
        dtype: of products.
    """
    apart = [
        torch.linalg.vector_norm(a - b) * math.sqrt(p.numel() / a.numel())
        for p, a, b in zip(parameters, run.samples, replayed.samples)
    ]
    least = LEAST_NORM * run.norms.square().mean().sqrt()
    # maximum() hands NaN on, and NaN is the largest to max()
    worst = torch.maximum(torch.stack(apart), (run.norms - replayed.norms).abs()) / (run.norms + least)
    gradient, index = worst.max(0)
    scale = run.loss.abs().clamp(min=LEAST_LOSS)
    losses = [
        (replayed.loss - run.loss).abs() / scale,
        (run.loss - (run.loss if plain is None else plain)).abs() / scale,
    ]
    found = torch.stack([*(t.double() for t in (*losses, gradient)), index.double()]).tolist()
    tensor = names.get(id(parameters[int(found[3])]), "a parameter")
    return Checked(found[0], found[1], found[2], tensor, LIMITS.get(dtype, LIMIT))


def _sample(tensor: Tensor) -> Tensor:
    """Elements from all over a tensor, copied. The step is odd, so that it meets all columns of a matrix."""
    step = -(-tensor.numel() // SAMPLE) | 1
    return tensor.reshape(-1)[::step].to(torch.float32, copy=True)
