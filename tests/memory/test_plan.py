"""The plan: it fits, it is next to the fastest of all, and its figures are near those that an H100 showed."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyralis.errors import ConfigError
from pyralis.memory.auto import margin
from pyralis.memory.cost import Batch
from pyralis.memory.explain import layer_lines
from pyralis.memory.footprint import CONTEXT, Standing, product_kept
from pyralis.memory.gpus import GIB, KNOWN, find_gpu
from pyralis.memory.peaks import peaks
from pyralis.memory.plan import TILES, fixed_plan, largest, plan
from pyralis.memory.predict import CHUNKS, Option, Predictor, Settings
from pyralis.models.policy import POLICIES, SavePolicy
from tests.memory.shapes import shape_of

H100 = find_gpu("h100")
EIGHT_BIT = Settings(moments=2)


# One H100 80GB, Llama-3-8B in NF4, rank 16 (docs/performance.md): batch, policy, matrices kept, recorded, ms, GiB of
# `max_memory_allocated`; with the code of before: see `kept_then`.
MEASURED: list[tuple[tuple[int, int], SavePolicy, bool, bool, float, float | None]] = [
    ((1, 1024), "keep", False, False, 100.4, 10.99),
    ((2, 2048), "keep", False, False, 250.5, 24.41),
    ((2, 2048), "keep", True, True, 239.2, 37.80),
    ((2, 2048), "keep", False, True, 249.8, 24.99),
    ((8, 2048), "keep", False, True, 964.0, None),
    ((2, 2048), "offload_input", False, False, 334.1, None),  # its peak was measured with leftovers of other runs
]


def kept_then(batch: Batch, policy: SavePolicy) -> int:
    """Bytes that layers kept besides when this was measured: act(gate) * up under "keep"."""
    layers = shape_of("llama3-8b").layers
    product = sum(e.element_size * e.groups[3].kept_width(keep=True) - product_kept(e) for e in layers)
    return batch.tokens * product if policy == "keep" else 0


def predicted(batch: tuple[int, int], policy: SavePolicy, resident: bool, recorded: bool) -> tuple[float, float, float]:
    """(ms, GiB allocated with the code that was measured, GiB allocated)"""
    made = fixed_plan(
        shape_of("llama3-8b"), Batch(*batch), policy, H100, replace(EIGHT_BIT, recorded=recorded), resident=resident
    )
    now = made.memory.allocated
    return made.seconds.total * 1e3, (now + kept_then(Batch(*batch), policy)) / GIB, now / GIB


@pytest.mark.parametrize(("batch", "policy", "resident", "recorded", "ms", "gib"), MEASURED)
def test_predictions_are_near_an_h100(
    batch: tuple[int, int], policy: SavePolicy, resident: bool, recorded: bool, ms: float, gib: float | None
) -> None:
    milliseconds, then, _ = predicted(batch, policy, resident, recorded)
    assert milliseconds == pytest.approx(ms, rel=0.15)
    if gib is not None:
        assert then == pytest.approx(gib, rel=0.05)


def test_the_page_has_these_figures() -> None:
    page = (Path(__file__).parents[2] / "docs/plan.md").read_text(encoding="utf-8")
    for batch, policy, resident, recorded, ms, gib in MEASURED:
        milliseconds, then, now = predicted(batch, policy, resident, recorded)
        words = policy + (", matrices kept" if resident else "") + (", recorded" if recorded else "")
        figures = f"{milliseconds:.0f} | {ms:.0f} | {f'{then:.2f}' if gib else '-'} | {gib or '-'} | {now:.2f}"
        assert f"| {batch[0]} x {batch[1]} | {words} | {figures} |" in page


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", ["llama3-8b", "gemma2-2b"])
def test_more_memory_is_never_slower_and_always_respected(name: str, recorded: bool) -> None:
    shape, batch = shape_of(name), Batch(2, 2048)
    before = float("inf")
    for gib in (6, 8, 10, 12, 16, 20, 24, 32, 40, 80):
        made = plan(shape, batch, gib * GIB, H100, Settings(recorded=recorded))
        assert made.fits == (made.memory.reserved <= gib * GIB)
        if made.fits:
            assert made.seconds.total <= before * 1.0001
            before = made.seconds.total
    assert set(made.policies) == {"keep"}
    assert all(made.keep_matrices)
    assert made.chunk_bytes is None


def test_what_does_not_fit_is_the_most_frugal_plan() -> None:
    made = plan(shape_of("llama3-8b"), Batch(2, 2048), 4 * GIB, H100)
    assert not made.fits
    assert set(made.policies) == {"offload_input"}
    assert (made.chunk_bytes, set(made.keep_matrices)) == (min(filter(None, CHUNKS)), {False})
    assert made.in_turn
    assert made.tile in TILES


def test_layers_at_the_front_recompute() -> None:
    made = plan(shape_of("llama3-8b"), Batch(2, 2048), 12 * GIB, H100, Settings(recorded=True))
    order = [POLICIES.index(policy) for policy in made.policies]
    assert order == sorted(order, reverse=True)
    assert len(Counter(made.policies)) > 1


RECORDED = Settings(recorded=True)
ON_H100 = H100.memory_bytes - CONTEXT - margin(H100.memory_bytes)


def longest(name: str, **how: Any) -> int:
    """Tokens of one row that fit an H100."""
    return 64 * largest(lambda n: Batch(1, 64 * n), shape_of(name, **how), ON_H100, H100, RECORDED, most=1 << 17)


def test_the_longest_context_is_that_of_the_page() -> None:
    tokens = longest("llama3-8b")
    assert tokens >= 420_000
    layer = shape_of("llama3-8b").layers[0]
    whole, tiled = (round(peaks(layer, "offload_input", tokens, tile).backward / tokens, -2) for tile in (None, 65_536))
    for page in ("docs/plan.md", "docs/zh/plan.md"):
        text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
        assert all(f"{figure:,.0f}" in text for figure in (tokens, longest("llama3-8b", dropout=0.05), tiled, whole))
    made = plan(shape_of("llama3-8b"), Batch(1, tokens), ON_H100, H100, RECORDED)
    assert made.fits
    assert not plan(shape_of("llama3-8b"), Batch(1, tokens + 64), ON_H100, H100, RECORDED).fits
    assert "layers 0-31: the MLP takes 65,536 tokens at a time" in layer_lines(made)


def test_tiles_are_taken_only_where_nothing_fits_without() -> None:
    shape = shape_of("llama3-8b")
    for length in (65_536, 262_144, 371_648, 480_000):
        made = plan(shape, Batch(1, length), ON_H100, H100, RECORDED)
        assert (made.tile, made.in_turn) == (None, False)
    for length in (540_000, 600_000, 700_000):
        made = plan(shape, Batch(1, length), ON_H100, H100, RECORDED)
        assert made.fits
        assert made.tile in TILES
        whole, tiled = (
            fixed_plan(
                shape, Batch(1, length), "offload_input", H100, RECORDED, budget=ON_H100, tile=tile,
                chunk_bytes=made.chunk_bytes, in_turn=made.in_turn,
            )
            for tile in (None, made.tile)
        )  # fmt: skip
        assert tiled.fits > whole.fits
        assert whole.seconds.total < tiled.seconds.total < 1.01 * whole.seconds.total


def test_smaller_tiles_take_less_memory_and_more_time() -> None:
    shape = shape_of("llama3-8b")
    made = [
        fixed_plan(shape, Batch(1, 16_384), "offload_input", H100, EIGHT_BIT, tile=tile) for tile in (None, *TILES[2:5])
    ]
    assert [each.tile for each in made] == [None, 16_384, 8192, 4096]
    memory, seconds = [each.memory.allocated for each in made], [each.seconds.total for each in made]
    assert memory[0] == memory[1] > memory[2] > memory[3]
    assert seconds[0] == seconds[1] < seconds[2] <= seconds[3]


def test_with_dropout_in_the_mlp_there_are_no_tiles() -> None:
    shape = shape_of("llama3-8b", dropout=0.05)
    made = plan(shape, Batch(1, 430_000), ON_H100, H100, RECORDED)
    assert not made.fits
    assert made.tile is None
    assert longest("llama3-8b", dropout=0.05) < 430_000


def test_matrices_in_turn_cost_what_they_save() -> None:
    """A layer that recomputes makes all but down's a third time; with tiles two of them for each tile."""
    shape, batch = shape_of("llama3-8b"), Batch(2, 2048)
    (layer, *_) = shape.layers
    at_once, in_turn, tiled = (
        fixed_plan(shape, batch, "offload_input", H100, EIGHT_BIT, in_turn=turn, tile=tile)
        for turn, tile in ((False, None), (True, None), (True, 1024))
    )
    assert at_once.memory.allocated - in_turn.memory.allocated == layer.matrices - layer.largest_matrix
    made, more, most = (each.seconds.dequantisation for each in (at_once, in_turn, tiled))
    again = sum(group.weights for group in layer.groups[:3])
    assert more / made == pytest.approx(1 + again / (2 * layer.weights))
    assert most / made == pytest.approx(
        (2 * 4 * sum(g.weights for g in layer.groups[2:]) + 2 * sum(g.weights for g in layer.groups[:2]) + again)
        / (2 * layer.weights)
    )


# Tokens, GiB that a step may take at the most, ms.
GOALS = [((1, 1024), 5.3, None), ((2, 2048), 5.9, 360), ((8, 2048), 8.5, 1250)]


@pytest.mark.parametrize(("batch", "gib", "ms"), GOALS)
def test_a_step_of_llama_3_8b_with_its_embedding_on_the_host(
    batch: tuple[int, int], gib: float, ms: float | None
) -> None:
    """As the page has it."""
    shape = shape_of("llama3-8b")
    table = shape.vocabulary * shape.hidden_size * shape.head_size
    on_host = replace(shape, outside=shape.outside - table)
    made, least = (plan(on_host, Batch(*batch), int(budget * GIB), H100, EIGHT_BIT) for budget in (gib, 0))
    allocated, milliseconds = made.memory.allocated / GIB, made.seconds.total * 1e3
    assert allocated <= gib
    assert ms is None or milliseconds <= ms
    frugal = f"{least.memory.allocated / GIB:.2f}" if least.memory.allocated < made.memory.allocated else "-"
    row = f"| {batch[0]} x {batch[1]} | {gib} | {allocated:.2f} | {milliseconds:.0f} | {frugal} |"
    standing = [least.memory.standing.total, *(getattr(least.memory.standing, f.name) for f in fields(Standing))]
    for page in ("docs/plan.md", "docs/zh/plan.md"):
        text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
        assert row in text
        assert all(f"{size / GIB:.2f}" in text for size in standing)


def test_recorded_steps_wait_for_no_launches() -> None:
    for recorded in (False, True):
        made = plan(shape_of("llama3-8b"), Batch(1, 512), 7 * GIB, H100, Settings(moments=2, recorded=recorded))
        assert made.fits
        assert (made.seconds.launches == 0) is recorded


def best_of_all(predictor: Predictor, budget: int) -> float | None:
    """The least time of all choices, by trying every one."""
    choices = [list(work.seconds) for work in predictor.works]
    found = [
        predictor.seconds(options, chunk).total
        for chunk in CHUNKS
        for options in product(*choices)
        if predictor.memory(options, chunk).reserved <= budget
    ]
    return min(found, default=None)


@settings(max_examples=25, deadline=None)
@given(
    share=st.floats(0, 1),
    rows=st.integers(1, 4),
    length=st.sampled_from([512, 2048, 4096]),
    name=st.sampled_from(["llama3-8b", "qwen2-1.5b", "gemma2-2b"]),
    gpu=st.sampled_from(["h100", "t4", "rtx4090"]),
    four_bit=st.booleans(),
)
def test_the_plan_is_next_to_the_best_of_all(
    share: float, rows: int, length: int, name: str, gpu: str, four_bit: bool
) -> None:
    """Never further from it than one change of one layer, the part that does not fit any more."""
    shape, batch, rates = shape_of(name, layers=3, four_bit=four_bit), Batch(rows, length), find_gpu(gpu)
    recorded = Settings(recorded=True)
    predictor = Predictor(shape, batch, replace(rates, launch_seconds=0.0), recorded)
    all_kept = tuple(max(work.seconds, key=lambda o: (o.policy == "keep", o.resident)) for work in predictor.works)
    least = tuple(Option("offload_input") for _ in shape.layers)
    low, high = (predictor.memory(options, None).reserved for options in (least, all_kept))
    budget = int(low + share * (high - low))
    best = best_of_all(predictor, budget)
    assert best is not None
    made = plan(shape, batch, budget, replace(rates, launch_seconds=0.0), recorded)
    one_layer = max(
        max(s.total for s in work.seconds.values()) - min(s.total for s in work.seconds.values())
        for work in predictor.works
    )
    assert made.memory.reserved <= budget
    assert best - 1e-12 <= made.seconds.total <= best + one_layer


def test_gpus_are_found_by_many_names() -> None:
    assert len(KNOWN) >= 24
    for name, expected in [
        ("rtx4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("4090", "RTX 4090"), ("v100", "V100-16GB"),
        ("A100 40GB", "A100-40GB"), ("a100", "A100-80GB"), ("T4", "T4"),
    ]:  # fmt: skip
        assert find_gpu(name).name == expected
    assert find_gpu("24GB").memory_bytes == 24 * GIB
    with pytest.raises(ConfigError, match="Did you mean rtx4090"):
        find_gpu("rtx4091")


@pytest.mark.parametrize(("length", "window"), [(7, None), (7, 3), (7, 7), (9, 20)])
def test_pairs_are_counted(length: int, window: int | None) -> None:
    exact: Any = sum(1 for q in range(length) for k in range(q + 1) if window is None or q - k < window)
    assert Batch(2, length).pairs(window) == pytest.approx(2 * exact)
