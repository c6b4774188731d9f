"""Rows grouped by length: each once, alike in length, and when a row comes does not depend on its length."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pyralis.data.grouped import GroupedSampler
from pyralis.data.stats import padded_positions


@given(st.lists(st.integers(1, 100), max_size=300), st.integers(1, 12), st.integers(0, 5))
def test_each_row_comes_once_and_a_step_is_in_order(lengths: list[int], step_rows: int, epoch: int) -> None:
    sampler = GroupedSampler(lengths, step_rows, seed=1)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)
    for start in range(0, len(order), step_rows):
        step = [lengths[row] for row in order[start : start + step_rows]]
        assert step == sorted(step)


def test_an_epoch_depends_on_seed_and_number_only() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 1000)
    one, same, other = (GroupedSampler(lengths, 8, seed) for seed in (1, 1, 2))
    assert list(one) == list(one) == list(same)
    assert list(one) != list(other)
    first = list(one)
    one.set_epoch(1)
    assert list(one) != first
    one.set_epoch(0)
    assert list(one) == first


def test_little_is_padding() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 20_000).clip(10, 2048).astype(int)
    grouped = padded_positions(lengths[list(GroupedSampler(lengths, 16, 0))], 8)
    random = padded_positions(lengths, 8)
    tokens = lengths.sum()
    assert 1 - tokens / random > 0.45
    assert 1 - tokens / grouped < 0.05


def test_when_a_row_comes_does_not_depend_on_its_length() -> None:
    """Over many epochs each row's mean place is the middle within what chance allows, and so is each row's chance to be
    left over for the short last step."""
    count, step_rows, epochs = 1003, 8, 400
    lengths = np.sort(np.random.default_rng(0).lognormal(5, 0.8, count)).astype(int)
    sampler = GroupedSampler(lengths, step_rows, seed=0)
    places = np.zeros(count)
    left_over = np.zeros(count)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order = sampler.order()
        places[order] += np.arange(count) // step_rows
        left_over[order[count // step_rows * step_rows :]] += 1
    steps = count // step_rows
    error = steps / np.sqrt(12 * epochs)  # standard error of the mean of a uniform place
    deviations = (places / epochs - steps / 2) / error
    assert abs(deviations).max() < 5
    assert abs(np.corrcoef(lengths, deviations)[0, 1]) < 4 / np.sqrt(count)
    expected = epochs * (count % step_rows) / count
    chi_square = ((left_over - expected) ** 2 / expected).sum()
    assert abs(chi_square - count) < 5 * np.sqrt(2 * count)
    assert abs(np.corrcoef(lengths, left_over)[0, 1]) < 4 / np.sqrt(count)


def test_rows_keep_changing_company() -> None:
    """Two neighbours by length share a step in some epochs only."""
    lengths = np.arange(1600)
    sampler = GroupedSampler(lengths, 8, seed=0)
    together = 0
    for epoch in range(50):
        sampler.set_epoch(epoch)
        place = np.argsort(sampler.order())
        together += place[800] // 8 == place[801] // 8
    assert 2 < together < 40
