"""The entries of `train_file` as groups of files, each with a weight, and a mixture of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyralis.data.files import HubDataset, resolve_files
from pyralis.data.mixture import mix
from pyralis.data.repeats import Seen
from pyralis.data.settings import DataSettings
from pyralis.data.store import Rows
from pyralis.errors import DataError


def source_groups(files: Sequence[str], settings: DataSettings) -> list[list[Path | HubDataset]]:
    """What each of `files` names; without weights all of it is one group.

    Raises DataError for a file that two entries name: whose weight would it have?
    """
    if not settings.weights:
        return [resolve_files(files, split=settings.split)]
    groups = [resolve_files([entry], split=settings.split) for entry in files]
    owner: dict[Path | HubDataset, str] = {}
    for entry, group in zip(files, groups):
        for found in group:
            if found in owner:
                raise DataError(
                    f"{found} is in two entries of train_file, {owner[found]} and {entry}: which of their weights does "
                    "it have? Name it once."
                )
            owner[found] = entry
    return groups


def mixed_rows(
    rows: Rows, kept: NDArray[np.int64], seen: Seen, settings: DataSettings
) -> tuple[NDArray[np.int64], list[str]]:
    """(the rows at `kept` as an epoch of the mixture, what there is to say of each source).

    seen: where each of the rows is from. Raises DataError for a source none of whose rows is kept.
    """
    entries = {
        str(found): number
        for number, group in enumerate(source_groups(settings.files, settings))
        for found in group
    }  # fmt: skip
    owner = np.array([entries[file] for file in seen.files], np.int64)[seen.file_numbers()][kept]
    parts = [kept[owner == number] for number in range(len(settings.weights))]
    for entry, part in zip(settings.files, parts):
        if not len(part):
            raise DataError(f"{entry}: none of its rows is left to be mixed with the others. Take it out, or mend it.")
    mixture = mix([rows.lengths[part] for part in parts], settings.weights, settings.stop)
    total = sum(mixture.tokens)
    notes = [
        f"{entry}: {tokens / total:.1%} of the tokens (weight {weight:g}), gone through {passes:.3g} times an epoch"
        for entry, tokens, weight, passes in zip(settings.files, mixture.tokens, settings.weights, mixture.passes)
    ]
    return np.concatenate(parts)[mixture.order], notes
