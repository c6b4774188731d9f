"""A line of text fitted into a width: pieces by importance, in shorter forms where they must, bars and sparklines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float]) -> str:
    """The finite values as bars between their own minimum and maximum."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((v - low) * scale)] for v in finite)


def bar(share: float, width: int, unicode: bool = True) -> str:
    full = min(width, int(share * width))
    return "━" * full + "─" * (width - full) if unicode else "#" * full + "-" * (width - full)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the live line: the widest form first. The least important pieces make room for the others."""

    importance: int
    style: str
    forms: Sequence[str]


def fit(parts: Sequence[Part], width: int) -> Text:
    """As many of the important parts as fit, each as wide as there is room for, in the order given."""
    chosen: dict[int, str] = {}
    left = width + 2
    by_importance = sorted(range(len(parts)), key=lambda i: -parts[i].importance)
    for i in by_importance:
        needed = cell_len(parts[i].forms[-1]) + 2
        if needed <= left:
            chosen[i], left = parts[i].forms[-1], left - needed
    for i in (i for i in by_importance if i in chosen):
        for form in parts[i].forms:
            if (more := cell_len(form) - cell_len(chosen[i])) <= left:
                chosen[i], left = form, left - more
                break
    pieces = [(chosen[i], parts[i].style) for i in sorted(chosen) if chosen[i]]
    return Text("  ", no_wrap=True, overflow="crop").join(Text(text, style) for text, style in pieces)
