"""What only the command does to its process: no telemetry, and a quiet, readable log. A library must not."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO


def set_up_process() -> None:
    """Before anything heavy is imported: no telemetry of any dependency, and no word on what nobody can mend.

    bitsandbytes advises an optional CPU kernel at each import; PEFT reads an attribute that transformers 5.23
    deprecates.
    """
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "ANONYMIZED_TELEMETRY_OPT_OUT"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def set_up_logging() -> None:
    """Pyralis's own log lines from INFO on go to stderr, as they are; other libraries only warn. Of a launcher's
    processes only the first one tells, the others warn."""
    quiet_libraries()
    logger = logging.getLogger("pyralis")
    if not logger.handlers:
        handler = _ToStderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logger.propagate = False


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that moment: a spinner or the live line puts itself in its place, so that lines
    stand above it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def quiet_libraries() -> None:
    """Switch off transformers' progress bars, which break the live line, and its advice."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
