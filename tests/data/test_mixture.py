"""Sources mixed by weight: shares of tokens, deterministic, nothing lost or nothing twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyralis.data.mixture import mix, next_source


def lengths(*sources: list[int]) -> list[np.ndarray]:
    return [np.array(source, np.int32) for source in sources]


def test_shares_are_of_tokens_not_of_documents() -> None:
    long, short = [1000] * 300, [10] * 30_000
    found = mix(lengths(long, short), (1.0, 1.0), "first_exhausted")
    assert found.tokens[0] == pytest.approx(found.tokens[1], abs=1000)
    assert (found.order >= 300).sum() == pytest.approx(100 * (found.order < 300).sum(), rel=0.01)


def test_first_exhausted_repeats_nothing() -> None:
    found = mix(lengths([5] * 10, [5] * 100), (1.0, 1.0), "first_exhausted")
    assert max(Counter(found.order.tolist()).values()) == 1
    assert found.passes == (1.0, 0.1)


def test_all_exhausted_leaves_nothing_out() -> None:
    found = mix(lengths([5] * 10, [5] * 100), (1.0, 1.0), "all_exhausted")
    assert set(found.order.tolist()) == set(range(110))
    assert found.passes == (10.0, 1.0)
    assert found.order[:4].tolist() == [0, 10, 1, 11]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sources=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=40), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.1, 0.3, 1.0, 2.5]), min_size=4, max_size=4),
    stop=st.sampled_from(["first_exhausted", "all_exhausted"]),
)
def test_shares_hold_wherever_the_mixture_is_cut(sources: list[list[int]], weights: list[float], stop: str) -> None:
    weights = weights[: len(sources)]
    found = mix(lengths(*sources), weights, stop)  # type: ignore[arg-type]
    owner = np.repeat(np.arange(len(sources)), [len(source) for source in sources])
    size = np.concatenate([np.array(source) for source in sources])
    tokens, longest = [0] * len(sources), max(map(max, sources))
    for document in found.order.tolist():
        tokens[owner[document]] += int(size[document])
        total = sum(tokens)
        for given_tokens, weight in zip(tokens, weights):
            share = weight / sum(weights)
            assert abs(given_tokens - share * total) <= longest * len(sources) * max(1.0, max(weights) / min(weights))
    for source in range(len(sources)):
        order = [document for document in found.order.tolist() if owner[document] == source]
        assert order == [order[0] + i % len(sources[source]) for i in range(len(order))] if order else True
    assert tuple(tokens) == found.tokens
    again = mix(lengths(*sources), weights, stop)  # type: ignore[arg-type]
    assert np.array_equal(again.order, found.order)


def test_the_first_of_several_gives() -> None:
    assert next_source((0, 0, 0), (1, 2, 3)) == 0
    assert next_source((10, 19, 40), (1, 2, 3)) == 1
