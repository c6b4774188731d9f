"""What is measured: a model, a mode, shapes, and peers with their variants. Nothing heavy is imported here: Unsloth has
to come first in its process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from pyralis.bench.train.peers import PEERS
from pyralis.errors import ConfigError

Mode: TypeAlias = Literal["qlora", "lora", "full"]
Loop: TypeAlias = Literal["bare", "trainer"]
MODES: tuple[Mode, ...] = get_args(Mode)
LOOPS: tuple[Loop, ...] = get_args(Loop)

LOSS_STEPS = 3  # whose losses are compared


@dataclass(frozen=True, slots=True)
class Shape:
    batch: int
    tokens: int  # of a row

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}"


@dataclass(frozen=True, slots=True)
class PeerChoice:
    name: str
    variants: tuple[str, ...]  # what is kept for the backward, in the peer's own words


@dataclass(frozen=True, slots=True)
class TrainBench:
    """One call of `pyralis bench train`.

    Attributes:
        model: a name in `MODELS` or a folder.
        steps, warmup: optimizer steps that are timed, and before them; peers that compile take more of the latter.
        profile: one more step under the profiler, for kernels and their time.
    """

    model: str
    mode: Mode
    shapes: tuple[Shape, ...]
    peers: tuple[PeerChoice, ...]
    loops: tuple[Loop, ...] = ("bare",)
    rank: int = 16
    dropout: float = 0.0
    learning_rate: float = 2e-4
    steps: int = 10
    warmup: int = 3
    profile: bool = False


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is counted of a model.

    Attributes:
        linear_parameters, lora_parameters: weights in products, the head's included; those of LoRA.
        attention_features: heads times their size; `layers` of them.
        dtype: to compute in.
    """

    linear_parameters: int
    lora_parameters: int
    attention_features: int
    layers: int
    vocabulary: int
    dtype: str


@dataclass(frozen=True, slots=True)
class MadeModel:
    """The model on the disk, and how to run it.

    Attributes:
        quantized: stored in 4 bits.
        targets: names of the linear layers that get LoRA.
        attention: `attn_implementation` of the peers that have one.
    """

    folder: Path
    quantized: bool
    targets: tuple[str, ...]
    attention: str
    device: str
    facts: ModelFacts


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: a peer with what it keeps, in a loop, at a shape."""

    peer: str
    variant: str
    loop: Loop
    shape: Shape


@dataclass(frozen=True, slots=True)
class Job:
    """What one peer's process does.

    Attributes:
        started, deadline: seconds since the epoch; no case is begun behind the deadline.
    """

    bench: TrainBench
    made: MadeModel
    peer: PeerChoice
    results: Path
    started: float
    deadline: float | None


def cases(bench: TrainBench, peer: PeerChoice) -> list[Case]:
    """In the order in which they are measured. A peer that has but one loop is measured in it, whatever is asked."""
    info = PEERS[peer.name]
    loops: list[Loop] = [loop for loop in bench.loops if loop in info.loops] or list(info.loops)
    return [
        Case(peer.name, variant, loop, shape) for variant in peer.variants for loop in loops for shape in bench.shapes
    ]


def parse_mode(text: str) -> Mode:
    for mode in MODES:
        if text == mode:
            return mode
    raise ConfigError(f"--mode {text!r}: expected one of {', '.join(MODES)}")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """`1x1024,2x2048` -> shapes. Raises ConfigError."""
    shapes = []
    for part in _split(text):
        batch, _, tokens = part.partition("x")
        if not (batch.isdecimal() and tokens.isdecimal() and int(batch) > 0 and int(tokens) > 1):
            raise ConfigError(f"--shapes {part!r}: expected batch x tokens, as 2x2048")
        shapes.append(Shape(int(batch), int(tokens)))
    if not shapes:
        raise ConfigError("--shapes names no shape: expected batch x tokens, as 1x1024,2x2048")
    return tuple(shapes)


def parse_loops(text: str) -> tuple[Loop, ...]:
    loops = _split(text)
    if not loops or any(loop not in LOOPS for loop in loops):
        raise ConfigError(f"--loop {text!r}: expected {' or '.join(LOOPS)}, or both between commas")
    return tuple(loops)  # type: ignore[arg-type]  # looked at just above


def parse_peers(peers: str, checkpointing: Sequence[str], mode: Mode) -> tuple[PeerChoice, ...]:
    """The peers in order, each with its default variants or those that `NAME=VARIANT,...` asks for.

    Variants run in the order of `PEERS`, whatever that of the request: what cannot be undone comes last there.

    Raises:
        ConfigError: an unknown peer or variant, or variants of a peer that does not run.
    """
    names = list(dict.fromkeys(_split(peers)))
    if unknown := [name for name in names if name not in PEERS]:
        raise ConfigError(f"unknown peer {', '.join(unknown)}; expected one of {', '.join(PEERS)}")
    chosen: dict[str, tuple[str, ...]] = {}
    for given in checkpointing:
        name, _, variants = given.partition("=")
        if name not in names:
            raise ConfigError(f"--checkpointing {given!r}: expected PEER=VARIANT,... of one of {', '.join(names)}")
        known = PEERS[name].variants_of(mode)
        wanted = _split(variants)
        if not wanted or any(variant not in known for variant in wanted):
            raise ConfigError(
                f"--checkpointing {given!r}: {name} has the variants {', '.join(known)} with --mode {mode}"
            )
        chosen[name] = tuple(variant for variant in known if variant in wanted)
    defaults = {name: [v for v in PEERS[name].variants_of(mode) if v in PEERS[name].defaults] for name in names}
    return tuple(PeerChoice(name, chosen.get(name, tuple(defaults[name]))) for name in names)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
