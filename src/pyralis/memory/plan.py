"""The memory plan: for each layer what it keeps, so that a step is the fastest that fits.

`plan` starts from the least memory and takes, again and again, the change that saves the most time per byte and still
fits; then it tries what is left. Each layer's choices first lose those that another beats in both bytes and time (the
convex hull of the knapsack problem with one choice of each class: Kellerer, Pferschy, Pisinger, Knapsack Problems,
2004, chapter 11). Layers at the front are the ones that recompute: their backward comes last, when the others' memory
is free again, so what it holds for a moment costs nothing. The MLP runs in tiles of tokens, and matrices are made one
after another, only where nothing fits without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from pyralis.memory.cost import Batch, Seconds
from pyralis.memory.gpus import GpuRates
from pyralis.memory.predict import CHUNKS, Memory, Option, Predictor, Settings
from pyralis.memory.shape import ModelShape
from pyralis.models.policy import SavePolicy

_SMALLEST = list(CHUNKS)[-1]
TILES = (65536, 32768, 16384, 8192, 4096, 2048, 1024, 512)  # tokens that an MLP may take at a time


class Way(NamedTuple):
    """What is the same for all layers of a plan: its fields of these names."""

    tile: int | None = None
    in_turn: bool = False


@dataclass(frozen=True)
class Plan:
    """What each layer keeps, and what that is predicted to come to.

    Attributes:
        policies, keep_matrices: of each decoder layer, from the first on.
        chunk_bytes: most bytes of logits at a time; None: 512 MiB.
        tile: tokens that the MLP of layers that recompute takes at a time; None: all.
        in_turn: whether matrices that are not kept are made one after another.
        batch: what it is for; smaller ones fit as well.
        budget: bytes that it had to fit in.
        fits: False where not even the least memory does: it is then that plan.
    """

    policies: tuple[SavePolicy, ...]
    keep_matrices: tuple[bool, ...]
    chunk_bytes: int | None
    tile: int | None
    in_turn: bool
    batch: Batch
    memory: Memory
    seconds: Seconds
    budget: int
    fits: bool


def plan(model: ModelShape, batch: Batch, budget: int, rates: GpuRates, settings: Settings | None = None) -> Plan:
    """The fastest plan whose reserved memory is at most `budget` bytes; the most frugal one where none is."""
    settings = Settings() if settings is None else settings
    for ways in ([Way()], _frugal_ways(model, batch)):
        found = [
            (predictor.seconds(options, chunk).total, predictor, options, chunk)
            for predictor in (_predictor(model, batch, rates, settings, way) for way in ways)
            for chunk in CHUNKS
            if (options := _fill(predictor, budget, chunk)) is not None
        ]
        if found:
            _, predictor, options, chunk = min(found, key=lambda each: each[0])
            return _made(predictor, options, chunk, budget)
    return _made(_frugal(model, batch, rates, settings), _least(model), _SMALLEST, budget)


def fixed_plan(
    model: ModelShape, batch: Batch, policy: SavePolicy, rates: GpuRates, settings: Settings | None = None,
    *, budget: int = 0, resident: bool = False, tile: int | None = None, in_turn: bool = False,
    chunk_bytes: int | None = None,
) -> Plan:  # fmt: skip
    """The same policy in every layer, and what it comes to."""
    predictor = _predictor(model, batch, rates, Settings() if settings is None else settings, Way(tile, in_turn))
    options = tuple(Option(policy, resident and layer.made) for layer in model.layers)
    return _made(predictor, options, chunk_bytes, budget)


def _predictor(model: ModelShape, batch: Batch, rates: GpuRates, settings: Settings, way: Way) -> Predictor:
    return Predictor(model, batch, rates, settings, way.tile, in_turn=way.in_turn)


def _least(model: ModelShape) -> tuple[Option, ...]:
    return tuple(Option("offload_input") for _ in model.layers)


def _frugal_ways(model: ModelShape, batch: Batch) -> list[Way]:
    """All but the usual one: with tiles that cut the batch, where any layer's MLP runs in tiles, and matrices in turn,
    where any are made."""
    tiled = any(layer.runs_in_tiles for layer in model.layers)
    tiles = [None, *(tile for tile in TILES if tiled and tile < batch.tokens)]
    turns = (False, True) if any(layer.made for layer in model.layers) else (False,)
    return [Way(tile, in_turn) for in_turn in turns for tile in tiles][1:]


def _frugal(model: ModelShape, batch: Batch, rates: GpuRates, settings: Settings) -> Predictor:
    """The one that needs the least with the most frugal options: with tiles there may be sums of gradients."""
    ways = [Way(), *_frugal_ways(model, batch)]
    found = [_predictor(model, batch, rates, settings, way) for way in ways]
    return min(found, key=lambda predictor: predictor.memory(_least(model), _SMALLEST).reserved)


def _made(predictor: Predictor, options: tuple[Option, ...], chunk: int | None, budget: int) -> Plan:
    memory = predictor.memory(options, chunk)
    return Plan(
        tuple(o.policy for o in options), tuple(o.resident for o in options), chunk, predictor.tile,
        predictor.in_turn, predictor.batch, memory,
        predictor.seconds(options, chunk), budget, memory.reserved <= budget,
    )  # fmt: skip


def _fill(predictor: Predictor, budget: int, chunk: int | None) -> tuple[Option, ...] | None:
    """The options of each layer; None where the least memory is too much already."""
    works, layers = predictor.works, predictor.model.layers
    cost = [
        {
            option: (work.kept[option.policy] + (layer.matrices if option.resident else 0), seconds.total)
            for option, seconds in work.seconds.items()
        }
        for work, layer in zip(works, layers)
    ]
    chosen = [min(each, key=lambda option, each=each: each[option]) for each in cost]  # type: ignore[misc]
    if predictor.memory(tuple(chosen), chunk).reserved > budget:
        return None

    def take(index: int, option: Option) -> bool:
        old, chosen[index] = chosen[index], option
        if cost[index][option][1] < cost[index][old][1] and predictor.memory(tuple(chosen), chunk).reserved <= budget:
            return True
        chosen[index] = old
        return False

    steps = [
        (saved / max(added, 1), index, option)
        for index, each in enumerate(cost)
        for saved, added, option in _hull(each)
    ]
    for _, index, option in sorted(steps, key=lambda step: (-step[0], -step[1])):
        take(index, option)
    for index in reversed(range(len(layers))):
        for option in sorted(cost[index], key=lambda o, each=cost[index]: each[o][1]):  # type: ignore[misc]
            if option == chosen[index] or take(index, option):
                break
    return tuple(chosen)


def _hull(cost: dict[Option, tuple[int, float]]) -> list[tuple[float, int, Option]]:
    """(seconds saved, bytes added, option) from each to the next of those worth taking, the best per byte first."""
    ordered = sorted(cost, key=lambda option: cost[option])
    kept: list[Option] = []
    for option in ordered:
        if kept and cost[option][1] >= cost[kept[-1]][1]:
            continue  # more bytes for no time
        while len(kept) > 1 and _rate(cost, kept[-2], kept[-1]) <= _rate(cost, kept[-1], option):
            kept.pop()
        kept.append(option)
    return [(cost[a][1] - cost[b][1], cost[b][0] - cost[a][0], b) for a, b in pairwise(kept)]


def _rate(cost: dict[Option, tuple[int, float]], a: Option, b: Option) -> float:
    """Seconds saved per byte from a to b."""
    return (cost[a][1] - cost[b][1]) / max(cost[b][0] - cost[a][0], 1)


def largest(
    make: Callable[[int], Batch], model: ModelShape, budget: int, rates: GpuRates, settings: Settings, *, most: int
) -> int:
    """The largest n up to `most` for which the batch `make(n)` fits with the most frugal plan; 0 if 1 does not."""

    def fits(n: int) -> bool:
        predictor = _frugal(model, make(n), rates, settings)
        return predictor.memory(_least(model), _SMALLEST).reserved <= budget

    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
