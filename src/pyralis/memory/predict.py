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
from pyralis.memory.footprint import HeadBytes, Standing, TiledBytes, head_bytes, standing_bytes
from pyralis.memory.gpus import GpuRates
from pyralis.memory.shape import LayerShape, ModelShape
from pyralis.models.policy import RECOMPUTING, SavePolicy

MIB = 2**20
# What a chunk of logits costs the head beside one of 512 MiB: Llama-3-8B, 4096 tokens, one H100 (docs/performance.md).
CHUNKS: dict[int | None, float] = {None: 1.0, 256 * MIB: 1.04, 128 * MIB: 1.14, 64 * MIB: 1.19}
REPLAY_SECONDS = 3e-3  # the CPU's part of a recorded step
IN_FLIGHT = 2  # inputs on their way between device and host


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
    """Of one layer, for a batch: bytes kept by option, and seconds. tiled: where its MLP runs in tiles."""

    kept: dict[SavePolicy, int]
    computed: int
    output: int
    backward: int
    moved: int  # bytes of its input
    seconds: dict[Option, Seconds]
    tiled: TiledBytes | None


def layer_work(layer: LayerShape, batch: Batch, rates: GpuRates, tile: int | None = None) -> Work:
    T = batch.tokens
    tile = tile if tile is not None and tile < T and layer.runs_in_tiles else None
    forward, backward = layer_seconds(layer, batch, rates)
    make, transfer = matrices_seconds(layer, rates), transfer_seconds(layer, batch, rates)
    seconds = {}
    for policy in KERNELS_AGAIN:
        again = again_seconds(layer, policy, batch, rates)
        whole = forward + backward + again
        if tile is not None and policy in RECOMPUTING:
            whole += tiles_seconds(layer, batch, rates, tile)
        if policy == "offload_input":  # beside the computing, as long as that takes longer
            late = max(0.0, transfer - forward.total) + max(0.0, transfer - (backward + again).total)
            whole = replace(whole, transfers=late + 0.02 * transfer)
        for resident in (False, True) if layer.made else (False,):
            seconds[Option(policy, resident)] = replace(whole, dequantisation=0.0 if resident else 2 * make)
    output = layer.spec.hidden_size * layer.residual_size * T
    return Work(
        {policy: footprint.kept_per_token(layer, policy) * T for policy in KERNELS_AGAIN},
        footprint.computed_per_token(layer) * T, output, footprint.backward_per_token(layer) * T, output, seconds,
        None if tile is None else footprint.tiled_bytes(layer, T, tile),
    )  # fmt: skip


class Predictor:
    """Predictions for one model, batch and GPU; layers that are one object in a shape are worked out once.

    tile: tokens that the MLP of layers takes at a time that recompute; None: all.
    """

    def __init__(
        self, model: ModelShape, batch: Batch, rates: GpuRates, settings: Settings, tile: int | None = None
    ) -> None:
        self.model, self.batch, self.rates, self.settings, self.tile = model, batch, rates, settings, tile
        works = {
            id(shape): layer_work(shape, batch, rates, tile) for shape in {id(s): s for s in model.layers}.values()
        }
        self.works = [works[id(shape)] for shape in model.layers]
        self.outside = outside_seconds(model, batch, rates, settings.accumulation)
        self._head = lru_cache(lambda chunk: head_bytes(model, batch.tokens, batch.learnt, chunk))
        self._standing = lru_cache(lambda resident: standing_bytes(model, resident, settings.moments))

    def memory(self, options: tuple[Option, ...], chunk: int | None) -> Memory:
        standing: Standing = self._standing(tuple(option.resident for option in options))
        head: HeadBytes = self._head(chunk)
        kept = [work.kept[option.policy] for work, option in zip(self.works, options)]
        before = [0, *accumulate(kept)]
        moving = [IN_FLIGHT * w.moved if o.policy == "offload_input" else 0 for w, o in zip(self.works, options)]
        moments = [(before[-1], max(head.forward, head.backward))]
        for index, (work, option) in enumerate(zip(self.works, options)):
            again = option.policy in RECOMPUTING
            held = work.computed - work.output if again else kept[index]
            peaks = work.computed, held + work.backward
            if again and work.tiled is not None:
                peaks = work.tiled.forward, work.tiled.backward
            moments += [(before[index], peak + moving[index]) for peak in peaks]
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
            KERNELS + KERNELS_AGAIN[o.policy] - (2 if o.resident else 0) for o in options
        )  # fmt: skip
        if self.tile is not None:
            tiled = sum(w.tiled is not None and o.policy in RECOMPUTING for w, o in zip(self.works, options))
            kernels += tiled * KERNELS_TILE * (-(-self.batch.tokens // self.tile) - 1)
        return kernels * self.rates.launch_seconds
