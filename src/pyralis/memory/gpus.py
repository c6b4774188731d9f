"""What a GPU can do, for predictions without one: `find_gpu("rtx4090")`, `find_gpu("24GB")`.

`KNOWN` holds data-sheet figures: NVIDIA's and AMD's data sheets, and for GeForce and RTX cards NVIDIA's architecture
white papers (Turing, Ampere GA102, Ada, Blackwell), with the tensor-core rate of half precision summed in float32 and
without sparsity. **They are not measurements**: what kernels reach of them is taken from one H100 (`EFFICIENCY`), and
predictions for other GPUs are as good as that analogy. `calibrate.py` measures the GPU that is there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from pyralis.errors import ConfigError

GIB = 2**30
LAUNCH_SECONDS = 55e-6


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the data sheet that were reached on an H100 SXM: docs/performance.md, and 55 GB/s over PCIe 5."""

    copy: float = 3.03e12 / 3.35e12
    matmul: float = 782e12 / 989e12
    host: float = 55e9 / 64e9


EFFICIENCY = Efficiency()


@dataclass(frozen=True, slots=True)
class GpuRates:
    """What is reached on a GPU.

    Attributes:
        memory_bytes: of the device, as `torch.cuda.mem_get_info` has it.
        copy_bytes_per_s: device memory, reads and writes together.
        matmul_flops_per_s: large products in half precision (float32 on a CPU).
        host_bytes_per_s: between device and pinned host memory, one way.
        launch_seconds: CPU time per kernel of an eager step, Python included. It is the CPU's, not the GPU's: 55 us on
            the H100 machine (100 ms for 1,700 kernels).
        capability: CUDA's compute capability.
    """

    name: str
    memory_bytes: int
    copy_bytes_per_s: float
    matmul_flops_per_s: float
    host_bytes_per_s: float
    launch_seconds: float = LAUNCH_SECONDS
    capability: tuple[int, int] = (8, 0)
    measured: bool = False


@dataclass(frozen=True, slots=True)
class KnownGpu:
    """memory in GiB, bandwidth and link in GB/s (one way), half in TFLOP/s. memory: what the driver leaves of it."""

    name: str
    memory: float
    bandwidth: float
    half: float
    link: float
    capability: tuple[int, int]

    def rates(self) -> GpuRates:
        return GpuRates(
            self.name,
            int(self.memory * GIB),
            self.bandwidth * 1e9 * EFFICIENCY.copy,
            self.half * 1e12 * EFFICIENCY.matmul,
            self.link * 1e9 * EFFICIENCY.host,
            capability=self.capability,
        )


_GPUS = (
    KnownGpu("T4", 14.7, 320, 65, 16, (7, 5)),
    KnownGpu("V100-16GB", 15.8, 900, 112, 16, (7, 0)),
    KnownGpu("V100-32GB", 31.7, 900, 112, 16, (7, 0)),
    KnownGpu("RTX 2080 Ti", 10.8, 616, 54, 16, (7, 5)),
    KnownGpu("RTX 3060 12GB", 11.8, 360, 25, 32, (8, 6)),
    KnownGpu("RTX 3080", 9.8, 760, 59.5, 32, (8, 6)),
    KnownGpu("RTX 3090", 23.7, 936, 71, 32, (8, 6)),
    KnownGpu("RTX 4060 Ti 16GB", 15.7, 288, 44, 16, (8, 9)),
    KnownGpu("RTX 4070", 11.7, 504, 58, 32, (8, 9)),
    KnownGpu("RTX 4070 Ti Super", 15.7, 672, 88, 32, (8, 9)),
    KnownGpu("RTX 4080", 15.7, 717, 97.5, 32, (8, 9)),
    KnownGpu("RTX 4090", 23.6, 1008, 165, 32, (8, 9)),
    KnownGpu("RTX 5080", 15.5, 960, 113, 64, (12, 0)),
    KnownGpu("RTX 5090", 31.4, 1792, 210, 64, (12, 0)),
    KnownGpu("RTX A6000", 47.5, 768, 155, 32, (8, 6)),
    KnownGpu("RTX 6000 Ada", 47.5, 960, 182, 32, (8, 9)),
    KnownGpu("A10", 22.5, 600, 125, 32, (8, 6)),
    KnownGpu("A100-40GB", 39.4, 1555, 312, 32, (8, 0)),
    KnownGpu("A100-80GB", 79.2, 2039, 312, 32, (8, 0)),
    KnownGpu("L4", 22.0, 300, 121, 32, (8, 9)),
    KnownGpu("L40S", 44.5, 864, 362, 32, (8, 9)),
    KnownGpu("H100", 79.2, 3350, 989, 64, (9, 0)),
    KnownGpu("H200", 139.8, 4800, 989, 64, (9, 0)),
    KnownGpu("B200", 178.0, 8000, 2250, 64, (10, 0)),
    KnownGpu("MI300X", 191.0, 5300, 1307, 64, (9, 0)),
)
KNOWN: dict[str, KnownGpu] = {re.sub(r"[^a-z0-9]", "", gpu.name.lower()): gpu for gpu in _GPUS}
_SHORT = {"v100": "v10016gb", "a100": "a10080gb", "3060": "rtx306012gb", "4060ti": "rtx4060ti16gb"}
_BY_MEMORY = "rtx3090"  # what a GPU is taken for of which only the memory is known


_OF_NO_WEIGHT = frozenset(
    {
        "nvidia", "amd", "geforce", "tesla", "instinct", "generation", "sxm", "sxm2", "sxm4", "sxm5", "hbm2", "hbm2e",
        "hbm3", "hbm3e",
    }
)  # fmt: skip


def known_gpu(device_name: str, memory_bytes: int) -> KnownGpu | None:
    """The GPU of the table that a driver calls `device_name` ("NVIDIA H100 80GB HBM3"); None for one that it does not
    hold, such as another card of the same number (an H100 PCIe, a laptop's, an RTX 3080 Ti)."""
    size = f"{round(memory_bytes / GIB)}gb"
    words = set(re.split(r"[\s-]+", device_name.lower())) - _OF_NO_WEIGHT
    for gpu in _GPUS:
        own = set(re.split(r"[\s-]+", gpu.name.lower()))
        if own <= words | {size} and not {word for word in words - own if not re.fullmatch(r"\d+gb", word)}:
            return gpu
    return None


def find_gpu(name: str) -> GpuRates:
    """A GPU of the table by its name ("rtx4090", "A100 40GB"), or one of so much memory ("24GB", with an RTX 3090's
    rates). Raises ConfigError for any other word."""
    key = re.sub(r"[^a-z0-9.]", "", name.lower().replace("nvidia", "").replace("geforce", ""))
    if (size := re.fullmatch(r"(\d+(?:\.\d+)?)(?:gb|gib|g)", key)) is not None:
        rates = KNOWN[_BY_MEMORY].rates()
        return GpuRates(
            f"a GPU of {size[1]} GiB", int(float(size[1]) * GIB), rates.copy_bytes_per_s, rates.matmul_flops_per_s,
            rates.host_bytes_per_s, capability=rates.capability,
        )  # fmt: skip
    known = KNOWN.get(key) or KNOWN.get(_SHORT.get(key, "")) or KNOWN.get(f"rtx{key}")
    if known is None:
        near = get_close_matches(key, KNOWN, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"--gpu {name!r} is not in the table.{hint} Expected one of {', '.join(KNOWN)}, or a size such as 24GB."
        )
    return known.rates()
