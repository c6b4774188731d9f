"""Nearest names, for errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SYNONYMS = {"lr": ("learning_rate",), "bs": ("per_device_train_batch_size",), "data": ("train_file",)}


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Known names that look like `name`, the likeliest first: by spelling, by shared words, by being part of it."""
    known = list(known)
    lower = {candidate.lower(): candidate for candidate in known}
    found = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=count, cutoff=0.7)]
    words = set(name.lower().split("_"))
    by_words = sorted(known, key=lambda candidate: (-len(words & set(candidate.split("_"))), len(candidate)))
    found += [candidate for candidate in by_words if len(words & set(candidate.split("_"))) >= 2]
    if len(name) >= 4:
        found += [candidate for candidate in by_words if name.lower() in candidate.lower()]
    found += [candidate for candidate in _SYNONYMS.get(name.lower(), ()) if candidate in known]
    return list(dict.fromkeys(found))[:count]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'a' or 'b'?"`, to follow a sentence, or nothing."""
    names = nearest(name, known)
    return f" Did you mean {' or '.join(map(repr, names))}?" if names else ""
