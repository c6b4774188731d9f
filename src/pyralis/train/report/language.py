"""Which of our two languages a terminal is spoken to in: Chinese where the locale is, else English."""

from __future__ import annotations

import os
from collections.abc import Mapping


def chinese_locale(environment: Mapping[str, str] | None = None) -> bool:
    """Whether messages should be Chinese, by POSIX: the first that is set of LC_ALL, LC_MESSAGES and LANG decides."""
    environment = os.environ if environment is None else environment
    name = next((value for key in ("LC_ALL", "LC_MESSAGES", "LANG") if (value := environment.get(key))), "")
    return name.lower().startswith("zh")


def words(english: str, chinese: str) -> str:
    """The one of both that the locale asks for."""
    return chinese if chinese_locale() else english
