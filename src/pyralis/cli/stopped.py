"""SIGTERM and Ctrl-C where no training loop hears them: while data is prepared, a model loaded, a result written."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

RESUME_ME = 75  # sysexits.h's EX_TEMPFAIL: a scheduler's SIGTERM was obeyed, and the same command goes on
EXIT_CODES = {signal.SIGTERM: RESUME_ME, signal.SIGINT: 130}


class Stopped(BaseException):
    """Raised where the signal comes. No Exception: nothing on its way may take it for an error to mend."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped at the first SIGTERM or SIGINT; at the second the process ends at once, as by SIGKILL, after which
    a run resumes as well. The training loop has handlers of its own meanwhile (`train/interrupt.py`)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if heard:
            os._exit(EXIT_CODES[signal.Signals(number)])
        heard = True
        raise Stopped(number)

    before: dict[signal.Signals, Any] = {number: signal.signal(number, handle) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def what_is_kept(output_dir: Path) -> str:
    """What the same command will do, in words."""
    from pyralis.train.checkpoints.checkpoint import list_checkpoints

    whole = list_checkpoints(output_dir)
    if not whole:
        return "Nothing had been trained yet; the same command begins anew."
    return f"The same command goes on from {whole[-1][1]}."
