"""Launches of kernels that are compiled already, in a quarter of the time that Triton's `kernel[grid](...)` takes.

`kernel[grid](...)` binds arguments, asks the environment for settings and looks the compiled kernel up by all of them:
8 us of Python a call, 75 us on the H100 machine's slower CPU, some twenty times a layer. What it returns, a compiled
kernel, launches itself by `compiled[grid](*arguments)`, as Triton's tutorials show. So it is kept here, by all that
Triton specialises a kernel on: the type of each argument, whether pointers and integers are multiples of 16, integers
that are 1, and the constants. Arguments differing in any of these find, or compile, another kernel. Where no profiler
watches, the step from `compiled[grid]` to its launcher is taken here as well.

Triton's settings (`triton.knobs`) are those of the first launch; its launch hooks are called.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pyralis.compat import is_known_launcher, launches_are_watched

try:
    import triton
except ImportError:  # for this platform there is none
    triton = None

Arguments = tuple[Any, ...]

_compiled: dict[tuple[Any, ...], tuple[Any, Arguments, bool]] = {}


def specialisation(arguments: Arguments) -> list[Any]:
    """What kernels are specialised on; finer than Triton's own key, so that equal lists mean the same kernel.

    Triton takes 1 for a constant, knows multiples of 16 from others, and has i32, i64 and u64 by size. Tensors count by
    dtype and by whether they start on 16 bytes; floats and None by being such.
    """
    found: list[Any] = []
    add = found.append
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            if -0x80000000 <= argument <= 0x7FFFFFFF:
                add("1" if argument == 1 else argument & 15 == 0)
            else:
                add(("i64" if argument <= 0x7FFFFFFFFFFFFFFF else "u64", argument & 15 == 0))
        elif argument is None or kind is float:
            add(kind)
        elif kind is bool:
            raise TypeError("a bool as a kernel's argument; make it a constexpr")
        else:
            add(argument.dtype)
            add(argument.data_ptr() & 15 == 0)
    return found


def launch_compiled(
    kernel: Any, grid: tuple[int, ...], arguments: Arguments, constants: Mapping[str, Any],
    num_warps: int, num_stages: int, fp_fusion: bool, device_index: int,
) -> None:  # fmt: skip
    """`kernel[grid](*arguments, **constants)` with these options on the current device, which is number `device_index`.

    kernel: a `triton.jit` function that outlives its launches, whose constexprs follow its arguments and are all given.
    """
    key = (
        id(kernel), device_index, num_warps, num_stages, fp_fusion,
        *specialisation(arguments), *constants, *constants.values(),
    )  # fmt: skip
    known = _compiled.get(key)
    if known is not None:
        compiled, rest, direct = known
        grid = (*grid, 1, 1)[:3]
        if not direct or launches_are_watched()():
            compiled[grid](*arguments, *rest)
            return
        stream = triton.runtime.driver.active.get_current_stream(device_index)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *rest)
        return
    compiled = kernel[grid](
        *arguments, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fp_fusion
    )  # fmt: skip
    # On AMD Triton looks at the size of a tensor's storage too. A hook of Triton's may have taken the launch over.
    if compiled is not None and torch.version.hip is None:
        rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        _compiled[key] = compiled, rest, is_known_launcher(compiled.run)
