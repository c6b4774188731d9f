"""What the calls of this package have to say, each once in a process."""

from __future__ import annotations

import logging

logger = logging.getLogger("pyralis")
_said: set[str] = set()


def notice(text: str) -> None:
    """Log `text` unless it was said before.

    A script that has set up logging gets it at INFO; in one that has not it goes to the terminal, else nobody would see
    it.
    """
    if text in _said:
        return
    _said.add(text)
    if logger.level == logging.NOTSET and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("Pyralis: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    logger.info(text)


def without_effect(parameters: dict[str, str]) -> None:
    """Name parameters that are accepted and do nothing here, and say why."""
    for name, reason in parameters.items():
        notice(f"{name} has no effect: {reason}")
