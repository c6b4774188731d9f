"""`pyralis bench ops`: every op beside its peers and its roofline."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import pyralis.bench.cases
from pyralis.bench.case import BASE, COMPILED, PEERS, PYRALIS, SHAPES, BenchCase, compiling
from pyralis.bench.measure import Rates, Timing, bench_stream, measure_rates, require_gpu, time_rotating
from pyralis.compat import installed_versions
from pyralis.errors import ConfigError
from pyralis.models.staging import write_text

INPUT_SETS = 3
PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "bitsandbytes", "pyralis")


@dataclass(frozen=True, slots=True)
class Result:
    """One case, measured."""

    op: str
    shape: str
    tokens: int
    dtype: str
    bytes: int
    flops: int
    roofline_us: float  # the larger of bytes over the copy rate and flops over the matmul rate
    timings: dict[str, Timing]  # by contender
    errors: dict[str, str]  # contenders that could not run

    def share(self, contender: str = PYRALIS) -> float:
        """Of the roofline, 1 at best."""
        return self.roofline_us / self.timings[contender].microseconds

    def overhead(self, contender: str = PYRALIS) -> float | None:
        """What it costs on top of the base, as a share of that; None where the case has no base, or is it."""
        base = self.timings.get(BASE)
        if base is None or contender == BASE:
            return None
        return self.timings[contender].microseconds / base.microseconds - 1


def op_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(pyralis.bench.cases.__path__))


def find_cases(ops: Sequence[str], shapes: Sequence[str], tokens: Sequence[int]) -> Iterator[BenchCase]:
    for given, known, what in ((ops, op_names(), "op"), (shapes, list(SHAPES), "shape")):
        if unknown := [name for name in given if name not in known]:
            raise ConfigError(f"unknown {what} {', '.join(unknown)}; expected one of {', '.join(known)}")
    for op in ops:
        module = import_module(f"pyralis.bench.cases.{op}")
        for shape in shapes:
            for count in tokens:
                yield from module.cases(SHAPES[shape], count)


def measure_case(case: BenchCase, rates: Rates, device: torch.device, without: Collection[str] = ()) -> Result:
    """Every contender at this size; one that fails (memory, an unsupported size) is reported, ours is raised."""
    torch.compiler.reset()  # each size is compiled anew: after eight dynamo would run the rest uncompiled
    with torch.cuda.stream(bench_stream()):
        sets = [case.contenders(device) for _ in range(INPUT_SETS)]
    timings, errors = {}, {}
    for name in sets[0]:
        if name in without:
            continue
        try:
            timings[name] = time_rotating([contenders[name] for contenders in sets])
        except Exception as error:  # whatever a peer raises: Triton's errors are no RuntimeError
            if name == PYRALIS:
                raise
            errors[name] = f"{type(error).__name__}: {error}"[:300]
    floor = max(case.bytes / rates.copy_bytes_per_s, case.flops / rates.matmul_flops_per_s) * 1e6
    return Result(
        case.op, case.shape, case.tokens, str(case.dtype).removeprefix("torch."),
        case.bytes, case.flops, floor, timings, errors,
    )  # fmt: skip


def bench_ops(
    ops: Sequence[str],
    shapes: Sequence[str],
    tokens: Sequence[int],
    out: Path | None,
    report: Callable[[str], None] = print,
    *,
    without: Collection[str] = (),
) -> list[Result]:
    """Measure, print a table, and with `out` write ops.json and ops.png into that folder.

    without: peers to leave out, of `PEERS`.
    """
    if unknown := [name for name in without if name not in PEERS]:
        raise ConfigError(f"unknown peer {', '.join(unknown)}; expected some of {', '.join(PEERS)}")
    cases = list(find_cases(ops, shapes, tokens))
    compiling.set(COMPILED not in without)
    device = require_gpu()
    torch.manual_seed(0)
    rates = measure_rates(device)
    results = []
    for number, case in enumerate(cases, 1):
        report(f"{number}/{len(cases)} {case.op} {case.shape} T={case.tokens}")
        results.append(measure_case(case, rates, device, without))
        torch.cuda.empty_cache()
    console = Console()
    # A log has no width; 80 columns would cut every figure.
    (console if console.is_terminal else Console(width=200)).print(table(results, rates))
    if out is not None:
        from pyralis.bench.plot import plot_shares

        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "ops.json", results, rates)
        plot_shares(out / "ops.png", results, rates)
        report(f"written: {out / 'ops.json'}, {out / 'ops.png'}")
    return results


def table(results: Sequence[Result], rates: Rates) -> Table:
    """A row per case: our time and share of the roofline, then the peers' times; +N %: on top of the base."""
    peers = list(dict.fromkeys(name for r in results for name in (*r.timings, *r.errors) if name != PYRALIS))
    built = Table(title=str(rates), caption="microseconds, median; * not captured in a CUDA graph")
    for column in ("op", "shape"):
        built.add_column(column, no_wrap=True)
    for column in ("tokens", PYRALIS, "roofline %", *peers):
        built.add_column(column, justify="right")
    for result in results:
        cells = [result.op, result.shape, str(result.tokens), _time(result, PYRALIS), f"{result.share():.0%}"]
        built.add_row(*cells, *(_peer(result, name) for name in peers))
    return built


def _time(result: Result, name: str) -> str:
    timing, overhead = result.timings[name], result.overhead(name)
    figure = f"{timing.microseconds:.1f}{'' if timing.graphed else '*'}"
    return figure if overhead is None else f"{figure} {100 * overhead:+.1f}%"


def _peer(result: Result, name: str) -> str:
    return _time(result, name) if name in result.timings else "failed" if name in result.errors else "-"


def write_json(path: Path, results: Sequence[Result], rates: Rates) -> None:
    """Everything measured, with the versions and the GPU; written beside and renamed."""
    versions = installed_versions(PACKAGES)
    record = {"rates": asdict(rates), "versions": versions, "results": [asdict(result) for result in results]}
    write_text(path, json.dumps(record, indent=1) + "\n")
