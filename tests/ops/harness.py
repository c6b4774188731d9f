"""How an op is proven: error against float64, poisoned and guarded outputs, determinism, and mutants that must fail."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from pyralis.ops._triton import INTERPRETED

# for tests that switch between kernel and reference on CPU tensors themselves, without the fixture `device`
interpreted = pytest.mark.skipif(not INTERPRETED, reason="this process compiles kernels for its GPU")
GUARD = 64  # elements around a buffer


@dataclass
class Guarded:
    """A buffer full of NaN between guards: `view` is [rows, columns] with rows `stride` apart."""

    storage: Tensor
    view: Tensor
    before: Tensor

    def check(self) -> None:
        """Every element of the view was written, and nothing else was."""
        assert not self.view.isnan().any(), "elements were left unwritten (or NaN was computed)"
        kept = self.storage.clone()
        torch.as_strided(kept, self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(float("nan"))
        assert torch.equal(_bits(kept), _bits(self.before)), "memory outside the output was written"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def guarded(*shape: int, dtype: torch.dtype, device: torch.device, stride: int | None = None) -> Guarded:
    """A poisoned buffer of `shape` (1-D or 2-D) whose rows are `stride` (default: the row length) elements apart."""
    rows, columns = (1, shape[0]) if len(shape) == 1 else shape
    stride = columns if stride is None else stride
    storage = torch.full((rows * stride + 2 * GUARD,), 777.0, dtype=dtype, device=device)
    view = torch.as_strided(storage, (rows, columns), (stride, 1), GUARD).fill_(float("nan"))
    return Guarded(storage, view[0] if len(shape) == 1 else view, storage.clone())


@dataclass
class _Sums:
    squares: float = 0.0
    largest: float = 0.0

    def add(self, difference: Tensor) -> None:
        assert difference.isfinite().all(), "NaN or infinity against the oracle"
        self.squares += float(difference.square().sum())
        self.largest = max(self.largest, float(difference.abs().max()))


@dataclass
class Accuracy:
    """Errors of an op and of its stock counterpart against float64, pooled over seeds, by tensor name.

    Passes when ours is at most `slack` times stock's in the root mean square and `max_slack` times in the largest
    element. Stock counts as no better than the oracle itself rounded to the dtype. `check` also makes each tensor
    1 % wrong and requires the same comparison to fail.
    """

    slack: float = 1.5
    max_slack: float = 3.0
    _ours: dict[str, _Sums] = field(default_factory=dict)
    _stock: dict[str, _Sums] = field(default_factory=dict)
    _rounded: dict[str, _Sums] = field(default_factory=dict)
    _mutant: dict[str, _Sums] = field(default_factory=dict)

    def add(self, name: str, ours: Tensor, stock: Tensor, oracle: Tensor) -> None:
        assert oracle.dtype == torch.float64, name
        assert ours.shape == stock.shape == oracle.shape, (name, ours.shape, stock.shape, oracle.shape)
        pairs = (
            (self._ours, ours),
            (self._stock, stock),
            (self._rounded, oracle.to(ours.dtype)),
            (self._mutant, ours.double() * 1.01),
        )
        for sums, value in pairs:
            sums.setdefault(name, _Sums()).add(value.detach().double() - oracle)

    def _failure(self, name: str, ours: _Sums) -> str | None:
        stock, rounded = self._stock[name], self._rounded[name]
        rms_bound = self.slack * max(stock.squares, rounded.squares) ** 0.5
        max_bound = self.max_slack * max(stock.largest, rounded.largest)
        if ours.squares**0.5 > rms_bound:
            return f"{name}: error {ours.squares**0.5:.3e} (norm), allowed {rms_bound:.3e}"
        if ours.largest > max_bound:
            return f"{name}: largest error {ours.largest:.3e}, allowed {max_bound:.3e}"
        return None

    def check(self) -> None:
        assert self._ours, "nothing was compared"
        for name, sums in self._ours.items():
            assert (failure := self._failure(name, sums)) is None, failure
            assert self._failure(name, self._mutant[name]) is not None, f"{name}: an error of 1 % is not noticed"


def oracle_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(outputs, gradients) of a differentiable function by autograd, in the dtype of its inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(grads, outputs)])
    return tuple(o.detach() for o in outputs), gradients


def assert_deterministic(run: Callable[[], Sequence[Tensor]], times: int = 2) -> None:
    """`run` makes fresh outputs from the same inputs each time; they must be equal bit by bit."""
    first = [copy.deepcopy(t) for t in run()]
    for _ in range(times - 1):
        for a, b in zip(first, run()):
            assert torch.equal(_bits(a), _bits(b)), "two runs differ"


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int, scale: float = 1.0) -> Tensor:
    """Normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum((i + 1) * n for i, n in enumerate(shape)))
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)
