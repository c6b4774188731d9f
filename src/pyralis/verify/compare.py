"""Errors of stock and fast to the truth, and what is asked of the fast ones.

An error is relative: ||got - truth|| / ||truth||. Within a component (the loss, the tokens' losses, the gradients of
all layers' q_proj.lora_A ...) the fast error may be 1.5 times stock's, of a single tensor 3 times. Errors below
`FLOORS` pass: sums in another order differ by that much.

Some batches amplify rounding: moving a half-precision model's embeddings by half a step moved stock's gradients of an
Arabic sentence by 13 % to 146 %. So stock may be given in several runs, and its largest error counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.verify.measure import Outcome

COMPONENT_FACTOR, TENSOR_FACTOR = 1.5, 3.0
# Of the loss and of all else, in the dtype computed in.
FLOORS = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-5, 1e-4), torch.float16: (1e-5, 1e-4)}
LOSS, TOKENS = "loss", "token losses"


@dataclass(frozen=True, slots=True)
class Compared:
    """Relative errors of stock and fast, and how large fast's may be. name: a tensor's, or a component's."""

    name: str
    stock: float
    fast: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.fast <= self.limit  # false for NaN as well


@dataclass(frozen=True, slots=True)
class Comparison:
    """One layout. components: in the order of the model. tensors: every single gradient. stock_runs: how many there
    were, the largest error of which counts."""

    layout: str
    stock_runs: int
    components: tuple[Compared, ...]
    tensors: tuple[Compared, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[Compared, ...]:
        """The tensors that failed, and of the components that did each one's worst tensor; the worst first."""
        found = {t.name: t for t in self.tensors if not t.passed}
        for component in (c for c in self.components if not c.passed):
            inside = [t for t in self.tensors if component_of(t.name) == component.name] or [component]
            worst = max(inside, key=_excess)
            found.setdefault(worst.name, Compared(worst.name, worst.stock, worst.fast, component.limit))
        return tuple(sorted(found.values(), key=_excess, reverse=True))


def compare(layout: str, truth: Outcome, stocks: Sequence[Outcome], fast: Outcome, dtype: torch.dtype) -> Comparison:
    """Judge the fast outcome of one batch. A gradient that only one of the two has is wrong by all of it."""
    loss_floor, floor = FLOORS[dtype]
    fast_error, *stock_errors = (abs(got.loss - truth.loss) / abs(truth.loss) for got in (fast, *stocks))
    stock_error = max(stock_errors)
    # Stock's error of a mean over n tokens may be near zero by luck: three standard errors of it are as good as none.
    rms = max(_rms(stock.token_losses - truth.token_losses) for stock in stocks)
    spread = rms / math.sqrt(len(truth.token_losses)) / abs(truth.loss)
    components = [
        Compared(LOSS, stock_error, fast_error, max(COMPONENT_FACTOR * stock_error, 3 * spread, loss_floor)),
        _compared(TOKENS, [_squares(truth.token_losses, fast.token_losses, *(s.token_losses for s in stocks))], floor),
    ]
    parts = (truth.gradients, fast.gradients, *(stock.gradients for stock in stocks))
    squares = {name: _squares(*(part.get(name) for part in parts)) for part in parts for name in part}
    tensors: list[Compared] = []
    for component, names in _grouped(squares).items():
        whole = _compared(component, [squares[name] for name in names], floor)
        components.append(whole)
        for name in names:
            single = _compared(name, [squares[name]], floor)
            limit = max(TENSOR_FACTOR * max(single.stock, whole.stock), floor)
            tensors.append(Compared(name, single.stock, single.fast, limit))
    return Comparison(layout, len(stocks), tuple(components), tuple(tensors))


def component_of(name: str) -> str:
    """Of a parameter's name: "q_proj.lora_A", "input_layernorm.weight", whichever layer and adapter it is of."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    lora = next((i for i, part in enumerate(parts) if part.startswith("lora_")), None)
    if lora is not None:
        kind = parts[lora] + (".bias" if parts[-1] == "bias" else "")
        return f"{parts[lora - 1]}.{kind}"
    if "modules_to_save" in parts:  # followed by the adapter's name
        place = parts.index("modules_to_save")
        del parts[place : place + 2]
    return ".".join([part for part in parts if part != "base_layer"][-2:])


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(component_of(name), []).append(name)
    return found


def _squares(truth: Tensor | None, *got: Tensor | None) -> tuple[float, ...]:
    """||truth||^2 and ||g - truth||^2 of each; what is not there is zero."""
    want = 0.0 if truth is None else truth.double()
    errors = (want if g is None else g.double() - want for g in got)
    return tuple(float(torch.as_tensor(t).square().sum()) for t in (want, *errors))


def _compared(name: str, squares: list[tuple[float, ...]], floor: float) -> Compared:
    whole, *errors = (math.sqrt(sum(part)) for part in zip(*squares))
    fast, *stocks = (error / whole if whole else (0.0 if error == 0 else math.inf) for error in errors)
    return Compared(name, max(stocks), fast, max(COMPONENT_FACTOR * max(stocks), floor))


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _excess(compared: Compared) -> float:
    return math.inf if math.isnan(compared.fast) else compared.fast / compared.limit
