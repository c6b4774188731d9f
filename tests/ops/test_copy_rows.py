from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyralis.ops._triton import Gpu, kernels_on_cpu, recording
from pyralis.ops.copy_rows import BYTES, NUM_WARPS, CopyLaunch, contiguous_rows, copy_rows, reference, supported
from tests.ops.harness import assert_deterministic, guarded, interpreted, random

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")


def strided(T: int, N: int, dtype: torch.dtype, device: torch.device, room: int = 0) -> Tensor:
    """Random rows with `room` columns behind them."""
    return random(T, N + room, dtype=dtype, device=device, seed=T)[:, :N]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("room", [0, 5, 64])
@pytest.mark.parametrize("N", [1, 8, 37, 576, 4096, 5000])
def test_bits_are_kept(device: torch.device, N: int, room: int, dtype: torch.dtype) -> None:
    """Into wide rows, and out of them. 4096 half-precision columns are one program's, 5000 two's; 576 four rows'."""
    x = strided(6, N, dtype, device)
    out = guarded(6, N, dtype=dtype, device=device, stride=N + room)
    assert copy_rows(out.view, x) is out.view
    out.check()
    assert torch.equal(out.view, x)
    back = guarded(6, N, dtype=dtype, device=device)
    copy_rows(back.view, out.view)
    back.check()
    assert torch.equal(back.view, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(device: torch.device, dtype: torch.dtype) -> None:
    """NaN, infinities, the sign of zero and the smallest numbers, bit by bit."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, torch.finfo(dtype).smallest_normal / 2])
    x = values.to(device, dtype).repeat(3, 7)
    out = torch.zeros((3, 40), dtype=dtype, device=device)
    copy_rows(out[:, :35], x)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out[:, :35].contiguous().view(bits), x.view(bits))
    assert not bool(out[:, 35:].any())


def test_more_rows_than_a_program_takes(device: torch.device) -> None:
    for N, T in ((1, 5000), (40, 300)):
        x, out = strided(T, N, torch.bfloat16, device, 3), guarded(T, N, dtype=torch.bfloat16, device=device)
        copy_rows(out.view, x)
        out.check()
        assert torch.equal(out.view, x)


def test_an_unaligned_start(device: torch.device) -> None:
    """Rows that begin on no 16 bytes, though strides and features are multiples of 16 elements."""
    wide = random(5, 112, dtype=torch.bfloat16, device=device, seed=0)
    out = torch.zeros_like(wide)
    copy_rows(out[:, 3:99], wide[:, 1:97])
    assert torch.equal(out[:, 3:99], wide[:, 1:97])
    assert not bool(out[:, :3].any() | out[:, 99:].any())


def test_contiguous_rows(device: torch.device) -> None:
    x = strided(6, 48, torch.float16, device, 16)
    got = contiguous_rows(x)
    assert got.is_contiguous()
    assert torch.equal(got, x)
    assert contiguous_rows(got) is got


def test_deterministic(device: torch.device) -> None:
    x = strided(9, 100, torch.bfloat16, device, 4)
    assert_deterministic(lambda: [copy_rows(torch.empty((9, 100), dtype=x.dtype, device=device), x)])


@interpreted
@settings(max_examples=25, deadline=None, derandomize=True)
@given(T=st.integers(0, 70), N=st.integers(0, 300), rooms=st.tuples(st.integers(0, 20), st.integers(0, 20)))
def test_any_shape(T: int, N: int, rooms: tuple[int, int]) -> None:
    with kernels_on_cpu():
        x, out = strided(T, N, torch.float32, CPU, rooms[0]), torch.full((T, N + rooms[1]), 7.0)
        copy_rows(out[:, :N], x)
    assert torch.equal(out[:, :N], x)
    assert bool((out[:, N:] == 7.0).all())


@interpreted
def test_what_the_kernel_does_not_take_is_copied_all_the_same() -> None:
    x = strided(4, 6, torch.float32, CPU)
    pairs = {
        "torch.float32 into torch.bfloat16": (torch.empty((4, 6), dtype=torch.bfloat16), x),
        "dtype torch.int64": (torch.empty((4, 6), dtype=torch.int64), x.long()),
        "not contiguous": (torch.empty((6, 4)).t(), x),
    }
    with kernels_on_cpu():
        assert supported(x, x) is None
        for reason, (out, given) in pairs.items():
            assert reason in str(supported(out, given))
            assert torch.equal(copy_rows(out, given), given.to(out.dtype))
    assert supported(x, x) == "kernels need a GPU"
    assert torch.equal(reference(torch.empty_like(x), x), x)


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match="same shape"):
        copy_rows(torch.empty(4, 6), torch.empty(1, 6))


@pytest.mark.parametrize(("T", "N"), [(1024, 4096), (4096, 4096), (16384, 8192)])
def test_one_launch_that_fills_a_gpu(T: int, N: int) -> None:
    with recording(Gpu((9, 0), 132)) as launches:
        x, wide = (torch.empty((T, n), dtype=torch.bfloat16, device="meta") for n in (N, N + 64))
        copy_rows(wide[:, :N], x)
    (launch,) = launches
    programs = launch.grid[0] * launch.grid[1]
    resident = 2048 // (32 * launch.num_warps)
    assert programs >= 132 * resident * 0.9
    assert programs * BYTES == T * N * 2


@pytest.mark.parametrize("features", [0, 1, 200, 576, 4096, 28672])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles(features: int, itemsize: int) -> None:
    for aligned, most in ((True, 32 // itemsize), (False, 16 // itemsize)):
        plan = CopyLaunch.of(features, itemsize, aligned)
        assert plan.rows * plan.block == most * 32 * NUM_WARPS
        assert plan.block < 2 * max(features, 1)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    T, N, stride = 2**19 + 3, 4096, 4160
    wide = torch.zeros((T, stride), dtype=torch.bfloat16, device="cuda")
    x = torch.randn((T, N), dtype=torch.bfloat16, device="cuda")
    copy_rows(wide[:, :N], x)
    assert torch.equal(wide[-5:, :N], x[-5:])
    assert torch.equal(wide[:, :N], x)
    assert not bool(wide[:, N:].any())
