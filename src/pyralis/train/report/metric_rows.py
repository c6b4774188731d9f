"""The rows of `metrics.jsonl`: what is measured of a run, written and read.

One JSON object per line; its `kind` is `train` (a logging window), `eval`, `samples` (answers to the sample questions)
or `event` (start, resume, checkpoint, interrupted, stopped_early, nan, skipped, spike, end). JSON has no NaN: such a
value is `null`, with its name and kind under `not_finite`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter, ValidationError

from pyralis.errors import DataError

METRICS_NAME = "metrics.jsonl"

EventName: TypeAlias = Literal[
    "start", "resume", "checkpoint", "interrupted", "stopped_early", "nan", "skipped", "spike", "end"
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One logging window. `loss` is the mean over its `window_steps` optimizer steps, up to and including `step`.

    Token counts are cumulative over the whole run, resumed parts included; rates are over the window, without the
    time spent evaluating and saving. On a CPU `peak_memory_gib` is None and the peak of the process stands in.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    supervised_tokens: int
    total_tokens: int
    supervised_tokens_per_second: float
    total_tokens_per_second: float
    peak_memory_gib: float | None
    peak_host_memory_gib: float | None
    elapsed_seconds: float
    mfu: float | None = None
    window_steps: int = 1
    seconds_by_part: dict[str, float] | None = None  # cumulative, by the parts of `train/part_clock.py`
    reward_chosen: float | None = None  # these four of preference training: means over the window's pairs
    reward_rejected: float | None = None
    reward_margin: float | None = None
    reward_accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class EvalMetrics:
    """One pass over the evaluation data."""

    step: int
    epoch: float
    loss: float
    perplexity: float | None  # None for preferences
    tokens: int | None
    seconds: float | None
    reward_chosen: float | None = None
    reward_rejected: float | None = None
    reward_margin: float | None = None
    reward_accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class SampledAnswers:
    """The answers to the sample questions at an evaluation, by question."""

    step: int
    epoch: float
    answers: dict[str, str]


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that happened at a step, with the cumulative counts a resumed run goes on from."""

    event: EventName
    step: int
    supervised_tokens: int
    total_tokens: int
    elapsed_seconds: float
    message: str = ""
    seconds_by_part: dict[str, float] | None = None


def rewards_of(logs: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """The `reward_` fields, from what a preference trainer logs; None where it logs none."""
    names = {"chosen": "chosen", "rejected": "rejected", "margin": "margins", "accuracy": "accuracies"}
    return {f"reward_{ours}": logs.get(f"{prefix}rewards/{theirs}") for ours, theirs in names.items()}


Metric: TypeAlias = StepMetrics | EvalMetrics | SampledAnswers | RunEvent
_KINDS: dict[str, type[StepMetrics] | type[EvalMetrics] | type[SampledAnswers] | type[RunEvent]] = {
    "train": StepMetrics,
    "eval": EvalMetrics,
    "samples": SampledAnswers,
    "event": RunEvent,
}


def parts_so_far(metrics: Sequence[Metric]) -> dict[str, float]:
    """The newest `seconds_by_part`; empty where none was measured."""
    measured = (m.seconds_by_part for m in reversed(metrics) if isinstance(m, StepMetrics | RunEvent))
    return next((parts for parts in measured if parts), {})


_READERS: dict[type, TypeAdapter[Any]] = {cls: TypeAdapter(cls) for cls in _KINDS.values()}
_KIND_OF = {cls: kind for kind, cls in _KINDS.items()}


def to_json(metric: Metric) -> str:
    """One line of `metrics.jsonl`, without its newline."""
    row: dict[str, Any] = {"kind": _KIND_OF[type(metric)], **asdict(metric)}
    row = {k: v for k, v in row.items() if v is not None or not k.startswith(("reward_", "seconds_by_part"))}
    odd = {k: str(v) for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    if odd:
        row |= dict.fromkeys(odd) | {"not_finite": odd}
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def from_json(line: str) -> Metric:
    """The inverse of `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
    row = json.loads(line)
    cls = _KINDS[row["kind"]]
    row |= {k: float(v) for k, v in row.get("not_finite", {}).items()}
    try:
        return _READERS[cls].validate_python({f.name: row[f.name] for f in fields(cls) if f.name in row})
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from error


def _read_lines(path: Path) -> Iterator[tuple[str, Metric]]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield line, from_json(line)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number == len(lines):  # no newline behind it: the run was killed while writing
                return
            raise DataError(
                f"{path}:{number}: not a row of metrics ({error}): {line[:80]!r}. Expected a JSON object whose "
                f'"kind" is one of {", ".join(_KINDS)}. Delete the line, or move the file away.'
            ) from error


def read_metrics(path: str | Path) -> list[Metric]:
    """The rows of a metrics file, in order. A half-written last line is left out."""
    return [metric for _, metric in _read_lines(Path(path))]


class MetricsWriter:
    """Appends rows to a metrics file, each flushed at once.

    `resume_step` None begins a new file (an older one is kept as `NAME.1.jsonl`, `NAME.2.jsonl`, ...); a number
    goes on from the file that is there, without its rows after that step: they will be measured again.
    `kept` holds the rows gone on from.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.kept: list[Metric] = []
        if self.path.exists():
            self._move_away() if resume_step is None else self._truncate(resume_step)
        self._file = self.path.open("a", encoding="utf-8")

    def _move_away(self) -> None:
        number = 1
        while (older := self.path.with_suffix(f".{number}{self.path.suffix}")).exists():
            number += 1
        self.path.rename(older)

    def _truncate(self, step: int) -> None:
        rows = [(line, metric) for line, metric in _read_lines(self.path) if metric.step <= step]
        beside = self.path.with_name(self.path.name + ".tmp")
        beside.write_text("".join(line + "\n" for line, _ in rows), encoding="utf-8")
        os.replace(beside, self.path)
        self.kept = [metric for _, metric in rows]

    def write(self, metric: Metric) -> None:
        self._file.write(to_json(metric) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
