"""What the time of a run went into, as shares of it."""

from __future__ import annotations

from dataclasses import dataclass

from pyralis.train.report.format import percent_text
from pyralis.train.report.language import words
from pyralis.train.report.summary import RunSummary

NAMES = {
    "compute": ("forward and backward", "前向与反向"),
    "optimizer": ("optimizer", "优化器"),
    "data": ("waiting for data", "等待数据"),
    "evaluation": ("evaluation", "评估"),
    "saving": ("saving", "保存"),
    "logging": ("logging", "记录"),
    "other": ("the rest", "其他"),
}
"""English and Chinese of the parts of `train/part_clock.py`, in the order in which they are shown."""
LEAST_SHOWN = 0.01
WAITING, LEAST_SECONDS = 0.1, 10.0


@dataclass(frozen=True, slots=True)
class PartShare:
    part: str
    english: str
    chinese: str
    seconds: float
    share: float


def part_shares(summary: RunSummary) -> list[PartShare]:
    """Those that took any time; empty where it was not measured."""
    parts = summary.seconds_by_part
    whole = sum(parts.values())
    return [
        PartShare(part, english, chinese, parts[part], parts[part] / whole)
        for part, (english, chinese) in NAMES.items()
        if whole > 0 and parts.get(part, 0.0) > 0
    ]


def parts_text(summary: RunSummary) -> str:
    """ "forward and backward 91%, optimizer 2%", by share; trifles and the rest are left out."""
    shown = sorted(
        (s for s in part_shares(summary) if s.share >= LEAST_SHOWN and s.part != "other"), key=lambda s: -s.share
    )
    separator = words(", ", "，")
    return separator.join(f"{words(s.english, s.chinese)} {s.share:.0%}" for s in shown)


def waiting_note(summary: RunSummary) -> str | None:
    """What to do where much of the time was spent on waiting for batches."""
    found = next((s for s in part_shares(summary) if s.part == "data"), None)
    if found is None or found.share < WAITING or found.seconds < LEAST_SECONDS:
        return None
    return (
        f"{percent_text(found.share)} of the time went into waiting for batches: dataloader_num_workers prepares them "
        "beside the training"
    )
