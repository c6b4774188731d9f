"""The tables of docs/performance.md, one function for each kind of result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyralis.bench.case import PYRALIS
from pyralis.bench.train.results import KIND, Record
from pyralis.bench.train.tables import markdown_table

RAGGED = {
    "padded, padding computed, eager": "padding computed",
    "padded, lengths said, eager": "padding removed, lengths from the collator",
}
KEPT = {
    "keep": "everything",
    "recompute_cheap": "all but the cheap parts",
    "recompute_layer": "each layer's input",
    "offload_input": "each layer's input, in host memory",
}


def table_of(path: Path) -> str:
    """The Markdown table of a result file."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(record, list):
        return block_table(record)
    if "parts" in record:
        return glu_table(record)
    match record.get("kind"):
        case kind if kind == KIND:
            return markdown_table(Record.read(path))
        case "ragged":
            return ragged_table(record)
        case "least memory":
            return least_memory_table(record)
        case _:
            return ops_table(record)


def ops_table(record: dict[str, Any]) -> str:
    """Of an ops.json: a row per case, times in microseconds."""
    results = record["results"]
    peers = list(dict.fromkeys(name for r in results for name in r["timings"] if name != PYRALIS))
    rates = record["rates"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    rows = []
    for r in results:
        ours = r["timings"][PYRALIS]["microseconds"]
        cells = [r["op"], r["shape"], str(r["tokens"]), f"{ours:.1f}", f"{r['roofline_us'] / ours:.0%}"]
        rows.append([*cells, *(_time(r["timings"].get(name)) for name in peers)])
    facts = (
        f"{rates['gpu']}; copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s and matmul "
        f"{rates['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s in the same run; {versions}."
    )
    return f"{facts}\n\n{_markdown(['op', 'model', 'tokens', 'Pyralis, us', 'of the roofline', *peers], rows)}"


def ragged_table(record: dict[str, Any]) -> str:
    """Of batches of ragged lengths: supervised tokens a second, milliseconds a batch, GiB allocated at the peak."""
    rows = [
        [RAGGED[r["case"]], f"{r['learnt_per_s']:,}", f"{r['ms']:.1f}", f"{r['peak_gib']:.2f}"]
        for r in record["results"]
    ]
    return _markdown(["", "supervised tokens/s", "ms", "peak, GiB"], rows)


def least_memory_table(record: dict[str, Any]) -> str:
    """Of steps in little memory: milliseconds and GiB, each beside what the memory plan predicted."""
    rows = []
    for r in record["results"]:
        tile = "" if r["tile"] is None else f", the MLP {r['tile']} tokens at a time"
        turn = ", matrices one after another" if r["in_turn"] else ""
        host = ", the embedding too" if r["host"] else ""
        cells = [f"{r['rows']} x {r['tokens']}", f"{KEPT[r['policy']]}{host}{turn}{tile}"]
        cells += [f"{r[key]:.1f}" for key in ("ms", "predicted_ms")]
        rows.append([*cells, *(f"{r[key]:.2f}" for key in ("allocated", "predicted", "reserved"))])
    columns = ["rows x tokens", "what is kept", "ms", "predicted", "peak, GiB", "predicted", "reserved"]
    return _markdown(columns, rows)


def glu_table(record: dict[str, Any]) -> str:
    """Of the GLU with LoRA: the best launch of those timed beside the kernels apart, microseconds."""
    rows = []
    for name, apart in record["parts"].items():
        model, _, rank = name.partition(" r=")
        cells = [model, rank]
        for kind in ("backward", "forward"):
            timed = [t["us"] for t in record["times"] if (t["model"], str(t["r"]), t["kind"]) == (model, rank, kind)]
            cells += [f"{apart[f'{kind}_apart']:.0f}", f"{min(timed):.0f}"]
        rows.append(cells)
    return _markdown(["", "rank", "backward, apart", "one kernel", "forward, apart", "one kernel"], rows)


def block_table(record: list[dict[str, Any]]) -> str:
    """Of 32 fused layers in the layout that is the default: milliseconds, and GiB allocated at the peak."""
    policies = list(KEPT)
    measured = [r for r in record if r["concat"] is None]
    measured.sort(key=lambda r: (-r["b"] * r["s"], policies.index(r["pol"]), r["resident"], r["drop"]))
    rows = []
    for r in measured:
        kept = KEPT[r["pol"]] + (", and the dequantised weights" if r["resident"] else "")
        rows.append([f"{r['b']} x {r['s']}", kept, f"{r['drop']:g}", f"{r['ms']:.1f}", f"{r['peak']:.2f}"])
    return _markdown(["rows x tokens", "what is kept", "dropout", "ms", "peak, GiB"], rows)


def _time(timing: dict[str, Any] | None) -> str:
    if timing is None:
        return "-"
    return f"{timing['microseconds']:.1f}{'' if timing['graphed'] else ' *'}"


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])
