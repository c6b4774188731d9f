"""What `verify_model` finds: what was compared, on what, and how it came out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from pyralis.models.surgery import AccelerationReport
from pyralis.train.report.environment import Environment
from pyralis.verify.compare import Compared, Comparison


@dataclass(frozen=True, slots=True)
class Subject:
    """What was compared, in words for a person.

    Attributes:
        base: of the weights: "plain" or "NF4".
        dtype: that products are made in.
        shape: rows and tokens a row.
        truth: the dtype of the truth.
    """

    model: str
    base: str
    adapter: str
    data: str
    dtype: torch.dtype
    device: str
    shape: tuple[int, int]
    truth: torch.dtype = torch.float64


@dataclass(frozen=True, slots=True)
class Verification:
    """acceleration: a layer that ran stock in any of the layouts counts as stock. comparisons: one a layout; none where
    no layer is fast."""

    subject: Subject
    acceleration: AccelerationReport
    comparisons: tuple[Comparison, ...]
    environment: Environment
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        subject = self.subject
        return {
            "passed": self.passed,
            "subject": asdict(subject) | {"dtype": dtype_name(subject.dtype), "truth": dtype_name(subject.truth)},
            "layers": [asdict(layer) for layer in self.acceleration.layers],
            "comparisons": [_comparison(comparison) for comparison in self.comparisons],
            "environment": asdict(self.environment),
            "notes": list(self.notes),
        }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _comparison(comparison: Comparison) -> dict[str, Any]:
    def entries(rows: tuple[Compared, ...]) -> list[dict[str, Any]]:
        return [asdict(row) | {"passed": row.passed} for row in rows]

    return {
        "layout": comparison.layout,
        "passed": comparison.passed,
        "components": entries(comparison.components),
        "tensors": entries(comparison.tensors),
    }
