"""Sources mixed by weight: each source's share of the tokens, kept at every point of the mixture.

The next document comes from the source that has given the fewest tokens for its weight, the first one of several. So
nothing is drawn, the shares are right to within one document of each source, wherever the mixture is cut, and its state
is a count of tokens for each source. Sources keep their own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Stop = Literal["first_exhausted", "all_exhausted"]


def next_source(tokens: Sequence[int], weights: Sequence[float]) -> int:
    """Which source is to give the next document, after each gave so many tokens."""
    return min(range(len(tokens)), key=lambda i: tokens[i] / weights[i])


@dataclass(frozen=True, slots=True)
class Mixture:
    """order: documents, as indices into all sources' documents laid end to end. passes: how often each source is gone
    through, the last time perhaps in part. tokens: what each has given."""

    order: NDArray[np.int64]
    passes: tuple[float, ...]
    tokens: tuple[int, ...]


def mix(lengths: Sequence[NDArray[np.int32]], weights: Sequence[float], stop: Stop) -> Mixture:
    """Mix documents of known lengths (in tokens, one array a source, none of them empty) into one epoch.

    It ends when the first source has nothing left to give (first_exhausted: no document comes twice), or when each has
    been gone through at least once (all_exhausted: no document is left out, smaller ones begin again).
    """
    assert len(lengths) == len(weights)
    assert all(len(source) for source in lengths)
    assert all(weight > 0 for weight in weights)
    starts = np.cumsum([0, *map(len, lengths)])
    documents = [source.tolist() for source in lengths]
    taken, tokens, order = [0] * len(documents), [0] * len(documents), []
    unfinished = set(range(len(documents)))
    while unfinished:
        source = next_source(tokens, weights)
        if stop == "first_exhausted" and source not in unfinished:
            break
        at = taken[source] % len(documents[source])
        order.append(int(starts[source]) + at)
        taken[source] += 1
        tokens[source] += documents[source][at]
        if taken[source] == len(documents[source]):
            unfinished.discard(source)
    passes = tuple(count / len(source) for count, source in zip(taken, documents))
    return Mixture(np.array(order, np.int64), passes, tuple(tokens))
