"""What a way of keeping comes to: the peak by category and the time by part."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from pyralis.memory import footprint
from pyralis.memory.cost import (
    KERNELS,
    KERNELS_AGAIN,
    KERNELS_IN_TURN,
    KERNELS_OUTSIDE,
    KERNELS_TILE,
    Batch,
    Seconds,
    again_seconds,
    layer_seconds,
    matrices_seconds,
    outside_seconds,
    tiles_seconds,
    transfer_seconds,
)
from pyralis.memory.footprint import HeadBytes, Standing, head_bytes, standing_bytes
from pyralis.memory.gpus import GpuRates
from pyralis.memory.peaks import Peaks, peaks
from pyralis.memory.shape import LayerShape, ModelShape
from pyralis.models.policy import POLICIES, RECOMPUTING, SavePolicy

MIB = 2**20
# What a chunk of logits costs the head beside one of 512 MiB: Llama-3-8B, 4096 tokens, one H100 (docs/performance.md).
CHUNKS: dict[int | None, float] = {None: 1.0, 256 * MIB: 1.04, 128 * MIB: 1.14, 64 * MIB: 1.19}
REPLAY_SECONDS = 3e-3  # the CPU's part of a recorded step


class Option(NamedTuple):
    """What is chosen for a layer."""

    policy: SavePolicy
    resident: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What a plan is made for besides model, batch and GPU.

    Attributes:
        moments: bytes of optimizer states per trained parameter: 8, or 2 in 8 bits.
        accumulation: micro-batches of an optimizer step.
        recorded: whether steps are replayed from CUDA graphs.
    """

    moments: float = 8.0
    accumulation: int = 1
    recorded: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """Device bytes at the peak, and host bytes. working: what the layer or the head at that moment holds besides."""

    standing: Standing
    activations: int
    working: int
    host: int

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` shows."""
        return self.standing.total + self.activations + self.working

    @property
    def reserved(self) -> int:
        """What the allocator takes for it."""
        return round(self.allocated * (1 + footprint.HOLES))


@dataclass(frozen=True, slots=True)
class Work:
    """Of one layer, for a batch: bytes kept and at the peaks, and seconds. tiled: whether its MLP may run in tiles."""

    kept: dict[SavePolicy, int]
    peaks: dict[SavePolicy, Peaks]
    moved: int  # bytes of its input
    seconds: dict[Option, Seconds]
    tiled: bool


def layer_work(
    layer: LayerShape, batch: Batch, rates: GpuRates, tile: int | None = None, *, in_turn: bool = False
) -> Work:
    T = batch.tokens
    tile = tile if tile is not None and tile < T and layer.runs_in_tiles else None
    forward, backward = layer_seconds(layer, batch, rates)
    transfer = transfer_seconds(layer, batch, rates)
    seconds = {}
    for policy in KERNELS_AGAIN:
        again = again_seconds(layer, policy, batch, rates)
        whole = forward + backward + again
        tiles = 1
        if tile is not None and policy in RECOMPUTING:
            tiles = -(-T // tile)
            whole += tiles_seconds(layer, batch, rates, tile)
        make = matrices_seconds(layer, rates, policy, in_turn=in_turn, tiles=tiles)
        if policy == "offload_input":  # beside the computing, as long as that takes longer
            late = max(0.0, transfer - forward.total) + max(0.0, transfer - (backward + again).total)
            whole = replace(whole, transfers=late + 0.02 * transfer)
        for resident in (False, True) if layer.made else (False,):
            seconds[Option(policy, resident)] = replace(whole, dequantisation=0.0 if resident else make)
    return Work(
        {policy: footprint.kept_per_token(layer, policy) * T for policy in POLICIES},
        {policy: peaks(layer, policy, T, tile) for policy in POLICIES},
        layer.spec.hidden_size * layer.residual_size * T, seconds, tile is not None,
    )  # fmt: skip


class Predictor:
    """Predictions for one model, batch and GPU; layers that are one object in a shape are worked out once.

    tile: tokens that the MLP of layers takes at a time that recompute; None: all. in_turn: whether matrices that are
    not kept are made one after another (`models/residency.py`).
    """

    def __init__(
        self, model: ModelShape, batch: Batch, rates: GpuRates, settings: Settings, tile: int | None = None,
        *, in_turn: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.rates, self.settings = model, batch, rates, settings
        self.tile, self.in_turn = tile, in_turn
        works = {
            id(shape): layer_work(shape, batch, rates, tile, in_turn=in_turn)
            for shape in {id(s): s for s in model.layers}.values()
        }
        self.works = [works[id(shape)] for shape in model.layers]
        self.outside = outside_seconds(model, batch, rates, settings.accumulation)
        self._head = lru_cache(lambda chunk: head_bytes(model, batch.tokens, batch.learnt, chunk))
        self._standing = lru_cache(lambda resident: standing_bytes(model, resident, settings.moments, in_turn=in_turn))

    def memory(self, options: tuple[Option, ...], chunk: int | None) -> Memory:
        standing: Standing = self._standing(tuple(option.resident for option in options))
        head: HeadBytes = self._head(chunk)
        kept = [work.kept[option.policy] for work, option in zip(self.works, options)]
        before = [0, *accumulate(kept)]
        moments = [(before[-1], max(head.forward, head.backward))]
        for held, work, option in zip(before, self.works, options):
            coming = work.moved if option.policy == "offload_input" else 0  # the input of the layer before
            peak = work.peaks[option.policy]
            moments.append((held, max(peak.forward, peak.backward + coming)))
        activations, working = max(moments, key=sum)
        host = sum(w.moved for w, o in zip(self.works, options) if o.policy == "offload_input")
        return Memory(standing, activations, working, host)

    def seconds(self, options: tuple[Option, ...], chunk: int | None) -> Seconds:
        total = replace(self.outside, head=self.outside.head * CHUNKS[chunk])
        for work, option in zip(self.works, options):
            total += work.seconds[option]
        return replace(total, launches=max(0.0, self.cpu_seconds(options) - total.total))

    def cpu_seconds(self, options: tuple[Option, ...]) -> float:
        """What the CPU takes to launch a step."""
        if self.settings.recorded:
            return REPLAY_SECONDS
        kernels = KERNELS_OUTSIDE + sum(
            KERNELS + KERNELS_AGAIN[o.policy] - (2 if o.resident else 0)
            + (KERNELS_IN_TURN if self.in_turn and layer.made and not o.resident else 0)
            for layer, o in zip(self.model.layers, options)
        )  # fmt: skip
        if self.tile is not None:
            tiled = sum(w.tiled and o.policy in RECOMPUTING for w, o in zip(self.works, options))
            kernels += tiled * KERNELS_TILE * (-(-self.batch.tokens // self.tile) - 1)
        return kernels * self.rates.launch_seconds
