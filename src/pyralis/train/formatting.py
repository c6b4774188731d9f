"""`formatting_func` of SFT as scripts write it: for one row, or for a batch of columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyralis.errors import DataError


@dataclass(frozen=True)
class OfOneRow:
    """A function of a batch of columns, called with a batch of one row."""

    function: Callable[[dict[str, list[Any]]], list[str]]

    def __call__(self, row: Mapping[str, Any]) -> str:
        texts = self.function({name: [value] for name, value in row.items()})
        if not isinstance(texts, list) or len(texts) != 1 or not isinstance(texts[0], str):
            raise DataError(
                f"formatting_func made {_shown(texts)} of a batch of one row; expected a list of one text. It has to "
                "return a text for each row."
            )
        return texts[0]


def of_one_row(function: Callable[[Any], Any], row: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], str]:
    """`function` as one of a single row, whichever it is: tried with `row`.

    A function of a batch reads letters for rows when it is given one row: it raises, or returns a list.

    Raises:
        DataError: it returns no text either way.
    """
    try:
        made = function(dict(row))
    except Exception as error:  # whatever indexing a row as a batch may raise
        made, why = None, f"it raises {type(error).__name__} ({error}) for one row"
    else:
        why = f"it returns {_shown(made)} for one row"
    if isinstance(made, str):
        return function
    batched = OfOneRow(function)
    try:
        batched(row)
    except Exception as error:
        raise DataError(
            f"formatting_func returns no text: {why}, and for a batch of columns {type(error).__name__}: {error}"
        ) from error
    return batched


def _shown(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 80 else text[:77] + "..."
