"""Numbers as a person reads them, the same in panels, live line and report."""

from __future__ import annotations

import math


def count_text(number: float) -> str:
    """1234567 -> "1.23M": three significant digits, at most six characters."""
    if not math.isfinite(number):
        return str(number)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit * 0.9995:
            return f"{_three_digits(number / limit)}{unit}"
    return _three_digits(number) if number % 1 else f"{number:.0f}"


def _three_digits(number: float) -> str:
    decimals = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{decimals}f}"


def duration_text(seconds: float | None) -> str:
    """3725 -> "1:02:05", 65 -> "1:05", 0.42 -> "0.4 s"; "?" when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def loss_text(loss: float | None) -> str:
    """Four decimals where they matter: "1.2345", "12.345", "0.0012", "3.2e-05", "nan"."""
    if loss is None:
        return "-"
    if not math.isfinite(loss):
        return str(loss)
    if loss != 0 and abs(loss) < 1e-3:
        return f"{loss:.1e}"
    return f"{loss:.4f}" if abs(loss) < 10 else f"{loss:.5g}"


def rewards_text(accuracy: float | None, margin: float | None, *, chinese: bool = False) -> str:
    """ "rewards 81 % right, margin 0.412"; empty without them."""
    if accuracy is None or margin is None:
        return ""
    right = percent_text(accuracy)
    return f"奖励 {right} 正确，差 {margin:.3g}" if chinese else f"rewards {right} right, margin {margin:.3g}"


def gib_text(gib: float | None) -> str:
    return "-" if gib is None else f"{gib:.2f} GiB" if gib < 10 else f"{gib:.1f} GiB"


def bytes_text(size: int | None) -> str:
    """123456789 -> "118 MiB", 5e9 -> "4.66 GiB"."""
    if size is None or size >= 2**30:
        return gib_text(None if size is None else size / 2**30)
    return f"{_three_digits(size / 2**20)} MiB"


def percent_text(share: float) -> str:
    """0.0351 -> "3.5 %", 0.00042 -> "0.042 %", 0.65 -> "65 %"."""
    percent = share * 100
    return f"{percent:.0f} %" if abs(percent) >= 9.95 or percent == 0 else f"{percent:.2g} %"


def number_of(number: int, noun: str) -> str:
    """1 -> "1 step", 1200 -> "1,200 steps"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
