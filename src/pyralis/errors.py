"""What Pyralis raises at its users.

Each message says what was given, what was expected and what to do. The command line prints these without a
traceback and exits with `exit_code`; anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import re

# Control characters but for tab and new line, and halves of surrogate pairs.
_NOT_PRINTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class PyralisError(Exception):
    """Base of every error a user can cause and mend."""

    exit_code = 1

    def __str__(self) -> str:
        """What names a user's input may hold what no terminal should get: it is escaped."""
        return _NOT_PRINTED.sub(lambda found: ascii(found[0])[1:-1], super().__str__())


class ConfigError(PyralisError, ValueError):
    """A key, value or combination in a config that cannot be trained with."""

    exit_code = 2


class DataError(PyralisError, ValueError):
    """A data file or row that cannot be used; the message names file and line."""

    exit_code = 2


class TemplateError(PyralisError, ValueError):
    """A chat template that is unknown, or whose assistant spans cannot be found."""

    exit_code = 2


class ModelError(PyralisError, ValueError):
    """A model folder, architecture or weight file that cannot be used."""

    exit_code = 2


class NotFiniteError(PyralisError, ArithmeticError):
    """A loss or a gradient that is NaN or infinite, so that training cannot go on."""

    exit_code = 1


class FetchError(PyralisError, OSError):
    """A download that failed at every source, or whose checksum is wrong."""

    exit_code = 3


class SaveError(PyralisError, OSError):
    """A checkpoint or result that could not be written: a full disk, a quota, a folder gone."""

    exit_code = 4


class DeviceError(PyralisError, RuntimeError):
    """A GPU that does nothing any more in this process."""

    exit_code = 1
