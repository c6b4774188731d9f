"""What was measured, as kept in JSON, and what follows from it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from pyralis.bench.measure import Rates
from pyralis.bench.train.clock import Measured
from pyralis.bench.train.settings import Case, ModelFacts, Shape, TrainBench
from pyralis.models.staging import write_text

KIND = "train"  # of the record, to tell it from those of `pyralis bench ops`


@dataclass(frozen=True, slots=True)
class Run:
    """A case and what came of it: measurements, or the reason why there are none."""

    case: Case
    measured: Measured | None = None
    error: str | None = None

    @property
    def seconds(self) -> float:
        """Of a step: the median."""
        assert self.measured is not None
        return statistics.median(self.measured.seconds)

    @property
    def cpu_seconds(self) -> float:
        assert self.measured is not None
        return statistics.median(self.measured.cpu_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.case.shape.batch * self.case.shape.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Loaded:
    """A peer's variant is ready to train.

    Attributes:
        import_seconds: from the start of the process until its libraries are imported.
        seconds: from then, or from the end of the variant before, until the model has its adapter.
    """

    peer: str
    variant: str
    import_seconds: float
    seconds: float


@dataclass(eq=False)
class Record:
    """A call of `pyralis bench train`. rates: None without a GPU."""

    bench: TrainBench
    facts: ModelFacts
    rates: Rates | None
    versions: dict[str, str]
    runs: list[Run] = field(default_factory=list)
    loaded: list[Loaded] = field(default_factory=list)
    kind: str = KIND

    def write(self, path: Path) -> None:
        write_text(path, _RECORD.dump_json(self, indent=1).decode() + "\n")

    @classmethod
    def read(cls, path: Path) -> Record:
        return _RECORD.validate_json(path.read_bytes())

    def flops(self, shape: Shape) -> float:
        """Multiplications and additions of a step, those of recomputation left out.

        2 for each weight and token forward, 2 for the gradient of the input, 2 for that of the weight where it is
        trained; attention's products over the causal half, twice as many backward.
        """
        tokens, facts = shape.batch * shape.tokens, self.facts
        if self.bench.mode == "full":
            products = 6.0 * facts.linear_parameters
        else:
            products = 4.0 * facts.linear_parameters + 6.0 * facts.lora_parameters
        return products * tokens + 6.0 * tokens * shape.tokens * facts.attention_features * facts.layers

    def utilisation(self, run: Run) -> float | None:
        """Model FLOPs per second over the GPU's own rate in a large matrix product of the same session."""
        return None if self.rates is None else self.flops(run.case.shape) / run.seconds / self.rates.matmul_flops_per_s


_RECORD = TypeAdapter(Record)
RUN_OR_LOADED: TypeAdapter[Run | Loaded] = TypeAdapter(Run | Loaded)
