"""Losses that stand far above those before them.

A step's loss is a spike where it exceeds the median of the last WINDOW finite losses by more than DEVIATIONS robust
standard deviations, 1.4826 times their median absolute deviation (for normal values that is the standard deviation:
Rousseeuw and Croux 1993, "Alternatives to the Median Absolute Deviation"). A deviation counts as at least LEAST_SHARE
of the median, so that a curve that hardly moves is not called spiky; and nothing is judged by fewer than LEAST losses.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW = 50
LEAST = 10
DEVIATIONS = 6.0
LEAST_SHARE = 0.02
_NORMAL = 1.4826


class SpikeDetector:
    """Fed with the loss of each step, in order."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float) -> float | None:
        """The median of the losses before, if this one is a spike. One that is not finite is passed over."""
        if not math.isfinite(loss):
            return None
        usual = None
        if len(self._losses) >= LEAST:
            middle = median(self._losses)
            deviation = _NORMAL * median(abs(other - middle) for other in self._losses)
            if loss - middle > DEVIATIONS * max(deviation, LEAST_SHARE * abs(middle)):
                usual = middle
        self._losses.append(loss)
        return usual
