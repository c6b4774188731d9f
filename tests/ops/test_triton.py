"""The foundations: rounding, launches, where kernels run."""

from __future__ import annotations

import math
import subprocess

import pytest
import torch

from pyralis.ops import _start, _triton
from pyralis.ops._triton import (
    Gpu,
    cdiv,
    gpu_of,
    kernels_on_cpu,
    launch,
    next_power_of_2,
    recording,
    store_as,
    tl,
    triton,
    unavailable,
    unsupported_tensors,
    warps_for,
)
from tests.ops.harness import interpreted


@triton.jit
def _cast_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    store_as(out + at, tl.load(x + at, mask=at < n, other=0.0), at < n)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of 3.4e38 to fp16: infinity is meant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_store_rounds_to_nearest_even(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=generator) * 10.0 ** torch.randint(-8, 4, (1000,), generator=generator)
    ties = torch.arange(1, 200).to(torch.float32) * 2.0**-9 + 1  # half way between neighbours in bf16
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, 6e-8])
    x = torch.cat([x, ties, special]).to(device)
    out = torch.empty_like(x, dtype=dtype)
    launch(_cast_kernel, (cdiv(x.numel(), 256),), x, out, x.numel(), device=device, num_warps=2, BLOCK=256)
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out.nan_to_num(nan=0.0, posinf=7.0), x.to(dtype).nan_to_num(nan=0.0, posinf=7.0))


def test_an_empty_grid_launches_nothing(device: torch.device) -> None:
    launch(_cast_kernel, (0,), None, None, 0, device=device, num_warps=1, BLOCK=16)


def test_recording_collects_what_would_run() -> None:
    x = torch.empty(10, device="meta")
    with recording(Gpu((7, 5), 40)) as launches:
        assert unavailable(x.device) is None
        assert gpu_of(x.device) == Gpu((7, 5), 40)
        launch(_cast_kernel, (1,), x, x, 10, device=x.device, num_warps=4, fp_fusion=False, BLOCK=16)
    assert [(item.kernel, item.grid, item.num_warps, item.fp_fusion) for item in launches] == [
        (_cast_kernel, (1,), 4, False)
    ]
    assert launches[0].constexprs == {"BLOCK": 16}
    assert unavailable(x.device) == "meta tensors hold no data"


@interpreted
def test_cpu_tensors_take_the_reference_unless_asked() -> None:
    cpu = torch.device("cpu")
    assert unavailable(cpu) == "kernels need a GPU"
    with kernels_on_cpu():
        assert unavailable(cpu) is None
        with kernels_on_cpu(False):
            assert unavailable(cpu) == "kernels need a GPU"
    assert unavailable(cpu) == "kernels need a GPU"


def test_kernels_on_cpu_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), kernels_on_cpu():
        pass


@interpreted
def test_unsupported_tensors() -> None:
    x = torch.zeros(4, 8)
    with kernels_on_cpu():
        assert unsupported_tensors(x, None, x.half(), x[:, :3]) is None
        assert unsupported_tensors(x, x.long()) == "dtype torch.int64"
        assert unsupported_tensors(x.t()) == "the last dimension is not contiguous"
        assert unsupported_tensors(x, x.to("meta")) == "tensors on cpu and meta"


def test_arithmetic() -> None:
    assert [next_power_of_2(n) for n in (0, 1, 2, 3, 4096, 4097)] == [1, 1, 2, 4, 4096, 8192]
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [warps_for(n) for n in (16, 512, 4096, 10**6)] == [1, 1, 8, 16]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "apt install gcc"),
        (subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"]), "python3-dev"),
        (FileNotFoundError("cc"), "apt install gcc"),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid\nmore"), "device kernel image is invalid"),
        (ValueError(), "ValueError"),
        (None, None),
    ],
)
def test_a_gpu_on_which_nothing_starts(monkeypatch: pytest.MonkeyPatch, error: Exception | None, told: str) -> None:
    tried = []

    def start(device: torch.device) -> None:
        tried.append(device)
        if error is not None:
            raise error

    device = torch.device("cuda", 7)
    monkeypatch.setattr(_start, "_start", start)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    _start.start_problem.cache_clear()
    try:
        problems = [unavailable(device) for _ in range(2)]
    finally:
        _start.start_problem.cache_clear()
    assert tried == [device]
    assert problems[0] == problems[1]
    if told is None:
        assert problems[0] is None
    else:
        assert problems[0] is not None
        assert problems[0].startswith("Triton cannot start kernels: ")
        assert told in problems[0]
        assert "more" not in problems[0]


def test_what_is_tried(device: torch.device) -> None:
    target = torch.zeros(1, dtype=torch.int32, device=device)
    _start._write_one[(1,)](target)
    assert target.item() == 1
