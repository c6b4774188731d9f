"""Whether peers learn the same: their first losses beside those of Hugging Face's libraries."""

from __future__ import annotations

from collections.abc import Sequence

from pyralis.bench.train.peers import KBIT
from pyralis.bench.train.results import Run

REFERENCES = ("hf", "hf-trl")
# What rounding to bfloat16 does to the mean over a thousand tokens and more: logits off by 2^-9 of their size, about
# 0.002 each, of which the mean has little left, and the same from the layers below.
NOISE = 0.002  # nats
# Of what training has changed. Adam's first steps are signs of gradients: where a gradient is near zero, rounding turns
# its sign.
SHARE = 0.05


def reference_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """Hugging Face's run at the same shape: rather of the same loop, and as loaded than with float32 parts."""

    def preference(other: Run) -> tuple[int, bool, bool]:
        case = other.case
        return REFERENCES.index(case.peer), case.loop != run.case.loop, KBIT in case.variant

    alike = [
        other
        for other in runs
        if other.measured is not None and other.case.peer in REFERENCES and other.case.shape == run.case.shape
    ]
    return min(alike, key=preference, default=None)


def excess(losses: Sequence[float], expected: Sequence[float]) -> float:
    """The largest difference of the losses of the first steps over what is tolerated: above 1 it is not rounding."""
    if not losses or len(losses) != len(expected):
        return float("inf")
    found = []
    for loss, right in zip(losses, expected):
        difference = abs(loss - right)
        found.append(
            difference / (NOISE + SHARE * abs(right - expected[0])) if difference == difference else float("inf")
        )
    return max(found)


def differs(run: Run, runs: Sequence[Run]) -> bool | None:
    """Whether a run's first losses are not Hugging Face's; None if there is nothing to compare it with."""
    reference = reference_of(run, runs)
    if run.measured is None or reference is None or reference.measured is None:
        return None
    return excess(run.measured.losses, reference.measured.losses) > 1
