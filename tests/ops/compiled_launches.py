"""Launches through `launch_compiled` beside Triton's own, on a driver that runs nothing; a script for test_compiled.py.

Triton under TRITON_INTERPRET cannot compile, so this runs in a process of its own. It prints, for each list of
arguments, whether the kernel that Triton would have taken was launched, with the arguments it would have given.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver

from pyralis.ops._compiled import launch_compiled


class Launcher:
    """In place of Triton's: remembers what was launched."""

    launched: tuple[Any, ...] = ()
    hooks_given = 0

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source = source

    def __call__(self, gridX: int, gridY: int, gridZ: int, stream: int, function: int, *rest: Any) -> None:
        metadata, _, enter, leave, *given = rest
        for hook in (enter, leave):  # as the launcher in C does
            if hook is not None:
                Launcher.hooks_given += 1
                hook(None)
        grid = (gridX, gridY, gridZ, stream, function)
        Launcher.launched = self.source, grid, metadata, [*map(id, given[:4]), *given[4:]]


class Utilities:
    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, *_: Any) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class Driver(GPUDriver):  # type: ignore[misc]
    def __init__(self) -> None:
        self.utils, self.launcher_cls = Utilities(), Launcher
        self.get_current_device, self.get_current_stream = lambda: 0, lambda device: 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_device_interface(self) -> Any:
        raise NotImplementedError


@triton.jit(do_not_specialize=["count"])
def _kernel(x, bias, stride, factor, count, BLOCK: tl.constexpr, SIGN: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count) * factor
    if bias is not None:
        value += tl.load(bias + at, mask=at < count)
    tl.store(x + at, value if SIGN else -value, mask=at < count)


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    memory = torch.zeros(64, dtype=torch.bfloat16)
    tensors = (memory, memory[1:], memory[8:], torch.zeros(8))
    constants = ({"BLOCK": 16, "SIGN": True}, {"SIGN": False, "BLOCK": 32})
    cases = [
        *((x, None, 64, 2.0, 5, c, 1) for x, c in itertools.product(tensors, constants)),
        *((memory, bias, 64, 2.0, 5, constants[0], 1) for bias in tensors),
        *((memory, None, stride, 2.0, 5, constants[0], 1) for stride in (1, 7, 16, 2**31 - 1, 2**31, 2**31 + 1, 2**63)),
        *((memory, None, 64, 0.5, count, constants[0], 1) for count in (1, 16, 17, 2**31)),
        (memory, None, 64, 2.0, 5, constants[0], 2),
    ]
    seen: list[Any] = []
    for turn in range(3):  # the second launch of each list finds what the first one left; the third is watched
        if turn == 2:
            triton.knobs.runtime.launch_enter_hook.add(seen.append)
        for *arguments, chosen, warps in cases:
            options = {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True}
            grid = (3, 2) if turn else (3,)
            _kernel[grid](*arguments, **chosen, **options)
            expected, Launcher.launched = Launcher.launched, ()
            Launcher.hooks_given, before = 0, len(seen)
            launch_compiled(_kernel, grid, tuple(arguments), chosen, warps, 3, True, 0)
            shown = [str(a.dtype) + str(a.data_ptr() % 16) if isinstance(a, torch.Tensor) else a for a in arguments]
            result = {"case": str((turn, shown, chosen, warps)), "same": Launcher.launched == expected}
            print(json.dumps({**result, "turn": turn, "hooks": Launcher.hooks_given, "seen": len(seen) - before}))


if __name__ == "__main__":
    main()
