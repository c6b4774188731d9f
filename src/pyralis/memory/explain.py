"""A plan in words, for a log, a terminal or a report."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TypeVar

from pyralis.memory.footprint import CONTEXT
from pyralis.memory.gpus import GIB
from pyralis.memory.plan import Plan
from pyralis.models.policy import RECOMPUTING, SavePolicy

Value = TypeVar("Value")
WORDS: dict[SavePolicy, str] = {
    "keep": "everything is kept",
    "recompute_cheap": "norms and act(gate) * up are computed again, the rest is kept",
    "recompute_layer": "the input is kept, the rest is computed again",
    "offload_input": "the input waits in host memory, the rest is computed again",
}


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def layer_lines(plan: Plan) -> list[str]:
    """ "layers 0-17: the input is kept, the rest is computed again", a line for each run of layers alike."""
    lines = [f"{span}: {WORDS[policy]}" for span, policy in _runs(plan.policies)]
    kept = [span for span, kept in _runs(plan.keep_matrices) if kept]
    if kept:
        lines.append(f"{', '.join(kept)}: dequantised matrices are kept between uses")
    if plan.in_turn:
        lines.append("dequantised matrices of a layer are made one after another, in the same memory")
    if plan.tile is not None:
        again = [span for span, tiled in _runs(policy in RECOMPUTING for policy in plan.policies) if tiled]
        lines.append(f"{', '.join(again)}: the MLP takes {plan.tile:,} tokens at a time")
    if plan.chunk_bytes is not None:
        lines.append(f"the head makes {plan.chunk_bytes >> 20} MiB of logits at a time, in place of 512")
    return lines


def memory_rows(plan: Plan) -> list[tuple[str, int]]:
    """(category, bytes) of the peak; they add up to what the GPU has to have."""
    memory = plan.memory
    standing = memory.standing
    return [
        ("weights", standing.weights),
        ("adapters and their compute copies", standing.adapters),
        ("gradients", standing.gradients),
        ("optimizer", standing.optimizer),
        ("dequantised matrices", standing.matrices),
        ("kept for the backward", memory.activations),
        ("working memory of a layer or the head", memory.working),
        ("libraries' workspaces", standing.libraries),
        ("holes between blocks", memory.reserved - memory.allocated),
        ("CUDA context", CONTEXT),
    ]


def second_rows(plan: Plan) -> list[tuple[str, float]]:
    """(part, seconds) of a micro-batch, without those that take nothing."""
    names = {
        "products": "products",
        "attention": "attention",
        "elementwise": "norms, RoPE, act(gate) * up",
        "adapters": "LoRA's own products",
        "dequantisation": "making matrices of 4-bit weights",
        "head": "head and loss",
        "optimizer": "optimizer",
        "transfers": "waiting for inputs from the host",
        "launches": "waiting for the CPU",
    }
    found = [(words, getattr(plan.seconds, name)) for name, words in names.items()]
    return [(words, seconds) for words, seconds in found if seconds > 0]


def summary(plan: Plan) -> str:
    """One line: for a log."""
    batch = plan.batch
    what = "; ".join(layer_lines(plan))
    peak = f"{gib(plan.memory.reserved)} of {gib(plan.budget)}"
    if not plan.fits:
        peak += ", which it will not fit into"
    return f"memory plan for {batch.tokens:,} tokens: {what}; {peak}, {plan.seconds.total * 1e3:.0f} ms predicted"


def _runs(values: Iterable[Value]) -> list[tuple[str, Value]]:
    """("layers 0-17", value) for each run of equal ones."""
    found = []
    for value, run in groupby(enumerate(values), key=lambda pair: pair[1]):
        indices = [index for index, _ in run]
        one = len(indices) == 1
        found.append((f"layer {indices[0]}" if one else f"layers {indices[0]}-{indices[-1]}", value))
    return found
