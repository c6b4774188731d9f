"""Timing on a CUDA GPU: medians of events around graph replays, cold L2, rotating inputs; and the GPU's own rates."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from pyralis.bench.case import Contender
from pyralis.errors import PyralisError
from pyralis.ops._capture import mend_capture


@dataclass(frozen=True, slots=True)
class Rates:
    """What this GPU does, measured in the same run as everything compared with it."""

    gpu: str
    copy_bytes_per_s: float  # bytes read plus bytes written
    matmul_flops_per_s: float  # bf16 (fp16 where bf16 is emulated), 8192^3

    def __str__(self) -> str:
        copy, matmul = self.copy_bytes_per_s / 1e12, self.matmul_flops_per_s / 1e12
        return f"{self.gpu}: copy {copy:.2f} TB/s, matmul {matmul:.0f} TFLOP/s"


@dataclass(frozen=True, slots=True)
class Timing:
    microseconds: float  # median
    spread: float  # interquartile range, microseconds
    graphed: bool


def require_gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise PyralisError(
            "benchmarks need a CUDA GPU and torch sees none: run `pyralis env` to see what torch was built for"
        )
    return torch.device("cuda", torch.cuda.current_device())


@cache
def bench_stream() -> torch.cuda.Stream:
    """Where contenders are made, warmed up and captured: autograd runs a backward on the stream of its forward, and
    a capture allows no other stream."""
    return torch.cuda.Stream()


def _graph(run: Contender) -> Callable[[], object] | None:
    """A replay of `run`'s kernels, without the CPU's time to launch them; None if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=bench_stream()):
            kept = run()
    except RuntimeError:  # it synchronises: timed as it is
        mend_capture(bench_stream())
        return None

    def replay(kept: object = kept) -> None:  # the outputs live in the graph's pool as long as it
        graph.replay()

    return replay


def time_rotating(runs: Sequence[Contender], *, repeats: int = 30, warmup: int = 3) -> Timing:
    """Median time of one call, taking the calls in turn, each after L2 was overwritten."""
    bench_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(bench_stream()):  # compile and allocate before capture
        for run in runs:
            for _ in range(warmup):
                run()
    torch.cuda.synchronize()
    replays = [_graph(run) for run in runs]
    calls = [run if replay is None else replay for run, replay in zip(runs, replays)]
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.zeros(max(3 * l2, 64 << 20) // 4, dtype=torch.int32, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for call in calls:
        call()
    for i, (start, end) in enumerate(events):
        # Read, not written: dirty lines would be written back while the call is timed, 17 us of an H100's L2.
        flush.amax()
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) * 1e3 for start, end in events)
    quartiles = statistics.quantiles(times, n=4)
    return Timing(statistics.median(times), quartiles[2] - quartiles[0], all(r is not None for r in replays))


def measure_rates(device: torch.device) -> Rates:
    """Copy and matmul rates, for the rooflines."""
    seconds = _copy_seconds(1 << 28, device)
    n, dtype = 8192, torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    a, b, c = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))
    matmul = time_rotating([lambda: torch.mm(a, b, out=c)], repeats=20)
    return Rates(torch.cuda.get_device_name(device), 2 * 2**30 / seconds, 2 * n**3 / (matmul.microseconds * 1e-6))


def _copy_seconds(elements: int, device: torch.device) -> float:
    """Seconds to move a float32 buffer to another, by the driver's copy or by a kernel, whichever is quicker."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    ways: tuple[Contender, ...] = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return min(time_rotating([way]).microseconds for way in ways) * 1e-6
