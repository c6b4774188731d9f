from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyralis.ops._triton import Gpu, kernels_on_cpu, recording
from pyralis.ops.nf4 import TileLaunch, dequantize, supported
from pyralis.ops.nf4_state import BLOCKSIZES, NestedAbsmax, Quantized, QuantType, from_quant_state, reference
from tests.ops.harness import assert_deterministic, guarded, interpreted

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")
VARIANTS: tuple[tuple[int, QuantType, int], ...] = ((64, "nf4", 0), (32, "fp4", 64), (4096, "nf4", 7))


def matrix(
    N: int,
    K: int,
    device: torch.device,
    *,
    quant_type: QuantType = "nf4",
    blocksize: int = 64,
    nested: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Quantized:
    """Random bytes and scales: every code and every nested index occurs."""
    generator = torch.Generator().manual_seed(seed + 7919 * N + K)

    def bytes_(n: int) -> torch.Tensor:
        return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator).to(device)

    def floats(*shape: int, scale: float) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) * scale).to(device)

    blocks = -(-N * K // blocksize)
    packed = bytes_(-(-N * K // 2))
    if not nested:
        return Quantized(packed, floats(blocks, scale=0.1), (N, K), blocksize, quant_type, dtype)
    code = (torch.rand(256, generator=generator) * 2 - 1).sort().values.to(device)
    scales = NestedAbsmax(floats(-(-blocks // 256), scale=0.1), code, floats(scale=0.2), 256)
    return Quantized(packed, bytes_(blocks), (N, K), blocksize, quant_type, dtype, scales)


def on_meta(q: Quantized) -> Quantized:
    nested = q.nested
    if nested is not None:
        nested = replace(
            nested, absmax=nested.absmax.to("meta"), code=nested.code.to("meta"), offset=nested.offset.to("meta")
        )
    return replace(q, packed=q.packed.to("meta"), absmax=q.absmax.to("meta"), nested=nested)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("N", "K"),
    [(5, 64), (3, 96), (7, 100), (5, 63), (1, 1), (33, 264), (2, 4096), (1, 4100), (3, 5000), (0, 64)],
)
def test_is_the_reference(device: torch.device, N: int, K: int, nested: bool, dtype: torch.dtype) -> None:
    for blocksize, quant_type, pad in VARIANTS:
        q = matrix(N, K, device, quant_type=quant_type, blocksize=blocksize, nested=nested)
        out = guarded(N, K, dtype=dtype, device=device, stride=K + pad)
        assert dequantize(q, out.view) is out.view
        out.check()
        assert same(out.view, reference(q, dtype))


def test_every_blocksize(device: torch.device) -> None:
    for blocksize, nested in product(BLOCKSIZES, (True, False)):
        q = matrix(9, 1000, device, blocksize=blocksize, nested=nested)
        assert same(dequantize(q), reference(q))


def test_default_output_and_dtype(device: torch.device) -> None:
    q = matrix(4, 128, device, dtype=torch.float16)
    assert same(dequantize(q), reference(q, torch.float16))
    assert same(dequantize(q, dtype=torch.float32), reference(q, torch.float32))
    assert dequantize(q, dtype=torch.float64).dtype == torch.float64


def test_packed_bytes_off_a_word(device: torch.device) -> None:
    """A view into an arena may begin at any byte."""
    q = matrix(6, 128, device)
    shifted = torch.cat((q.packed[:1], q.packed))[1:]
    assert TileLaunch.of([q], torch.bfloat16, [128]).vector == 8
    assert TileLaunch.of([replace(q, packed=shifted)], torch.bfloat16, [128]).vector == 1
    assert same(dequantize(replace(q, packed=shifted)), reference(q))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the interpreter's
def test_extreme_scales(device: torch.device) -> None:
    """Rounding to half precision at its edges: overflow, underflow, zero."""
    q = matrix(5, 64, device, nested=False)
    q.absmax.copy_(torch.tensor([1e5, 1e-7, 0.0, 65504.0, 3e38], device=device))
    for dtype in DTYPES:
        assert same(dequantize(q, dtype=dtype), reference(q, dtype))


def test_deterministic(device: torch.device) -> None:
    q = matrix(37, 520, device)
    assert_deterministic(lambda: [dequantize(q)])


def test_nothing_is_contracted() -> None:
    """code * absmax + offset has two roundings in bitsandbytes: with one, 6 % of the absmax differ."""
    with recording(Gpu((9, 0), 132)) as launches:
        dequantize(on_meta(matrix(64, 128, CPU)))
    assert [launch.fp_fusion for launch in launches] == [False]


@interpreted
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 12), K=st.integers(1, 700), pad=st.integers(0, 24), blocksize=st.sampled_from(BLOCKSIZES),
    nested=st.booleans(), quant_type=st.sampled_from(("nf4", "fp4")), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(
    N: int, K: int, pad: int, blocksize: int, nested: bool, quant_type: QuantType, dtype: torch.dtype
) -> None:
    q = matrix(N, K, CPU, blocksize=blocksize, nested=nested, quant_type=quant_type)
    out = guarded(N, K, dtype=dtype, device=CPU, stride=K + pad)
    with kernels_on_cpu():
        dequantize(q, out.view)
    out.check()
    assert same(out.view, reference(q, dtype))


@interpreted
def test_supported_says_why() -> None:
    q, out = matrix(4, 64, CPU), torch.empty(4, 64)
    assert supported(q, out) == "kernels need a GPU"
    with kernels_on_cpu():
        assert supported(q, out) is None
        assert "float64" in str(supported(q, out.double()))
        assert "not contiguous" in str(supported(q, torch.empty(64, 4).t()))
        assert "meta" in str(supported(q, torch.empty(4, 64, device="meta")))


def test_tiles_fit_the_rows() -> None:
    def shape(*widths: int, dtype: torch.dtype = torch.bfloat16, pad: int = 64) -> tuple[int, int, int]:
        matrices = [matrix(2, k, CPU) for k in widths]
        plan = TileLaunch.of(matrices, dtype, [k + pad for k in widths])
        return plan.rows, plan.cols, plan.vector

    assert shape(4096) == (1, 4096, 8)
    assert shape(4096, 14336) == (2, 2048, 8)
    assert shape(3584, 18944) == (4, 1024, 8)
    assert shape(11008) == (4, 1024, 8)
    assert shape(4096, dtype=torch.float32) == (1, 2048, 8)
    assert shape(4096, pad=3) == (1, 2048, 8)
    assert shape(100) == (8, 256, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_is_bitsandbytes_on_the_gpu(quant_type: str, dtype: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator(device="cuda").manual_seed(0)
    for (N, K), blocksize, nested in product(((1000, 4096), (96, 100), (77, 576)), BLOCKSIZES, (True, False)):
        weight = torch.randn(N, K, device="cuda", generator=generator).to(dtype)
        packed, state = bnb.quantize_4bit(
            weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
        )
        assert torch.equal(dequantize(from_quant_state(packed, state)), bnb.dequantize_4bit(packed, state))


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    N, K, device = 2**19 + 8, 4096, torch.device("cuda")
    blocks = N * K // 64
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device=device)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
    scales = torch.rand(blocks // 256, device=device)
    code = torch.linspace(-1, 1, 256, device=device)
    offset = torch.tensor(1.5, device=device)
    q = Quantized(packed, absmax, (N, K), 64, "nf4", torch.bfloat16, NestedAbsmax(scales, code, offset, 256))
    out = torch.full((N, K + 8), float("nan"), dtype=torch.bfloat16, device=device)
    dequantize(q, out[:, :K])
    for first in (0, 2**18, 2**19 - 4, N - 4):  # four rows are 256 blocks, so that a slice has its own nested absmax
        part = Quantized(
            packed[first * K // 2 : (first + 4) * K // 2], absmax[first * 64 : (first + 4) * 64], (4, K), 64, "nf4",
            torch.bfloat16, NestedAbsmax(scales[first // 4 : first // 4 + 1], code, offset, 256),
        )  # fmt: skip
        assert same(out[first : first + 4, :K], reference(part))
    assert out[:, K:].isnan().all()
    assert not out[:, :K].isnan().any()


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    q = matrix(64, 512, torch.device("cuda"))
    expected = dequantize(q)
    out = torch.full_like(expected, float("nan"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dequantize(q, out)
    out.fill_(float("nan"))
    graph.replay()
    assert same(out, expected)
