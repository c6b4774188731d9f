"""The rates of the GPU that is there, measured once (under two seconds) and kept in Pyralis's cache folder.

The file is `CACHE/gpus/NAME-VERSIONS.json`; it is measured anew when the GPU, torch or Triton are others, and when it
cannot be read. CACHE: see `models/fetch.py`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pyralis.compat import installed_versions
from pyralis.memory.gpus import LAUNCH_SECONDS, GpuRates
from pyralis.models.fetch import cache_root
from pyralis.models.staging import write_text

logger = logging.getLogger(__name__)

REPEATS = 7
COPY_BYTES, HOST_BYTES, SIZE = 256 << 20, 64 << 20, 4096
# A view of a tensor took 5 us of CPU on the machine where a kernel of an eager step took 55, Python included.
VIEW_SECONDS = 5e-6
LEAST_FREE = 2 * COPY_BYTES + 4 * SIZE * SIZE * 2


@cache
def device_rates(device: torch.device) -> GpuRates:
    """Of this GPU: from the cache, or measured now. With too little memory free they are measured and not kept."""
    name = torch.cuda.get_device_name(device)
    versions = "-".join(installed_versions(("torch", "triton")).values())
    path = cache_root() / "gpus" / f"{re.sub(r'[^A-Za-z0-9.]+', '_', f'{name}-{versions}')}.json"
    if (known := read_rates(path)) is not None:
        return known
    begin = time.perf_counter()
    rates = measure_rates(device)
    torch.cuda.empty_cache()
    logger.info("%s was measured for the memory plan in %.1f s.", name, time.perf_counter() - begin)
    if torch.cuda.mem_get_info(device)[0] > LEAST_FREE:
        keep_rates(path, rates)
    return rates


def read_rates(path: Path) -> GpuRates | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return GpuRates(**{**values, "capability": tuple(values["capability"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or of another version


def keep_rates(path: Path, rates: GpuRates) -> None:
    """A cache folder that cannot be written to is no reason to stop: then each process measures."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(dataclasses.asdict(rates), indent=1) + "\n")
    except OSError as error:
        logger.info("The GPU's rates are not kept: %s", error)


@torch.no_grad()
def measure_rates(device: torch.device, *, scale: float = 1.0) -> GpuRates:
    """Copies, a large product in half precision (float32 on a CPU), copies to and from pinned memory, views.

    scale: of the sizes; below 1 where memory is short, and in tests.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        scale = min(scale, torch.cuda.mem_get_info(device)[0] / (2 * LEAST_FREE))
    source = torch.empty(max(int(COPY_BYTES * scale), 1024), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / _seconds(lambda: target.copy_(source), device)
    side = max(int(SIZE * scale**0.5) // 64 * 64, 64)
    capability = torch.cuda.get_device_capability(device) if on_gpu else (8, 0)
    dtype = (torch.bfloat16 if capability >= (8, 0) else torch.float16) if on_gpu else torch.float32
    a, b, out = (torch.zeros((side, side), dtype=dtype, device=device) for _ in range(3))
    generator = torch.Generator(device).manual_seed(0)  # a run's random numbers stay as they are
    for matrix in (a, b):  # zeros take less power, and so less time
        matrix.normal_(std=0.1, generator=generator)
    flops = 2 * side**3 / _seconds(lambda: torch.mm(a, b, out=out), device)
    link = copy
    if on_gpu:
        host = torch.empty(max(int(HOST_BYTES * scale), 1024), dtype=torch.uint8, pin_memory=True)
        part = source[: host.numel()]
        there = _seconds(lambda: host.copy_(part, non_blocking=True), device)
        back = _seconds(lambda: part.copy_(host, non_blocking=True), device)
        link = host.numel() / max(there, back)
    name, memory = ("a CPU", 0)
    if on_gpu:
        name, memory = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
    launch = LAUNCH_SECONDS * _view_seconds() / VIEW_SECONDS
    return GpuRates(name, memory, copy, flops, link, launch, capability, measured=True)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The median of some runs after a first one."""
    work()
    taken = []
    for _ in range(REPEATS):
        if device.type != "cuda":
            begin = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begin)
            continue
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(torch.cuda.current_stream(device))
        work()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return median(taken)


def _view_seconds(count: int = 2000) -> float:
    tensor, taken = torch.empty(4, 4), []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        for _ in range(count):
            tensor[:2]
        taken.append((time.perf_counter() - begin) / count)
    return median(taken)
