from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from pyralis.errors import ModelError
from pyralis.ops.nf4_state import (
    BLOCKSIZES,
    Quantized,
    code_tables,
    dequantize_int8,
    from_params4bit,
    from_quant_state,
    quantize_nf4,
    reference,
)
from tests.ops.harness import random

bnb = pytest.importorskip("bitsandbytes.functional")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantized(
    N: int, K: int, dtype: torch.dtype, *, quant_type: str = "nf4", blocksize: int = 64, nested: bool = True
) -> tuple[torch.Tensor, Any]:
    """(bitsandbytes' packed weight, its state)"""
    weight = random(N, K, dtype=dtype, device=CPU, seed=N * K + blocksize, scale=0.3)
    return bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)


def one_by_one(q: Quantized) -> torch.Tensor:
    """The equations on single float32 numbers, without anything that the reference uses."""
    N, K = q.shape
    values = code_tables(CPU).numpy()[0 if q.quant_type == "nf4" else 16 :]
    packed, absmax = q.packed.numpy(), q.absmax.numpy()
    out = np.empty(N * K, np.float32)
    for i in range(N * K):
        byte, block = packed[i // 2], i // q.blocksize
        scale = absmax[block]
        if q.nested is not None:
            scale = q.nested.code.numpy()[scale] * q.nested.absmax.numpy()[block // q.nested.blocksize]
            scale = scale + q.nested.offset.numpy()
        out[i] = values[byte & 15 if i % 2 else byte >> 4] * scale
    return torch.from_numpy(out).view(N, K).to(q.dtype)


def test_tables_are_those_of_bitsandbytes() -> None:
    assert torch.equal(code_tables(CPU)[:16], bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(code_tables(CPU)[16:], bnb.get_4bit_type("fp4", device="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_reference_is_bitsandbytes(quant_type: str, dtype: torch.dtype) -> None:
    """On the CPU, bit by bit, where rows are whole blocks: of others its AVX512 path takes the wrong absmax."""
    for blocksize, nested in product([b for b in BLOCKSIZES if b <= 1024], (True, False)):
        packed, state = quantized(70, 1024, dtype, quant_type=quant_type, blocksize=blocksize, nested=nested)
        got = reference(from_quant_state(packed, state))
        assert got.dtype == dtype
        assert torch.equal(got, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize(("N", "K"), [(3, 96), (5, 63), (7, 100), (1, 1), (9, 8), (2, 4500)])
def test_reference_at_ragged_shapes(N: int, K: int) -> None:
    for blocksize, nested, quant_type in product((32, 64, 4096), (True, False), ("nf4", "fp4")):
        packed, state = quantized(N, K, torch.bfloat16, quant_type=quant_type, blocksize=blocksize, nested=nested)
        q = from_quant_state(packed, state)
        assert torch.equal(reference(q), one_by_one(q))


def test_parts_are_not_copied() -> None:
    from bitsandbytes.nn import Params4bit

    weight: Any = Params4bit(random(24, 128, dtype=torch.bfloat16, device=CPU, seed=0), quant_type="nf4")
    weight = weight.to("cpu")
    state = weight.quant_state
    q = from_params4bit(weight)
    assert (q.shape, q.blocksize, q.quant_type, q.dtype) == ((24, 128), 64, "nf4", torch.bfloat16)
    assert q.packed.data_ptr() == weight.data_ptr()
    assert q.absmax.data_ptr() == state.absmax.data_ptr()
    assert q.nested is not None
    assert q.nested.absmax.data_ptr() == state.state2.absmax.data_ptr()
    assert q.nested.offset.data_ptr() == state.offset.data_ptr()
    assert type(q.packed) is torch.Tensor


def test_any_storage_dtype() -> None:
    weight = random(24, 128, dtype=torch.float32, device=CPU, seed=0)
    expected = reference(from_quant_state(*bnb.quantize_4bit(weight, quant_type="nf4")))
    for storage in (torch.bfloat16, torch.float32, torch.int8):
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
        q = from_quant_state(packed, state)
        assert q.packed.data_ptr() == packed.data_ptr()
        assert torch.equal(reference(q), expected)


def test_leading_dimensions_are_rows() -> None:
    weight = random(3 * 8, 64, dtype=torch.float32, device=CPU, seed=0)
    experts = from_quant_state(*bnb.quantize_4bit(weight.view(3, 8, 64), quant_type="nf4"))
    assert experts.shape == (24, 64)
    assert torch.equal(reference(experts), reference(from_quant_state(*bnb.quantize_4bit(weight, quant_type="nf4"))))


def test_quantize_nf4() -> None:
    weight = random(24, 128, dtype=torch.bfloat16, device=CPU, seed=0, scale=0.1)
    q = quantize_nf4(weight, blocksize=128)
    packed, state = bnb.quantize_4bit(weight, blocksize=128, compress_statistics=True, quant_type="nf4")
    assert torch.equal(q.packed, packed.view(-1))
    assert torch.equal(q.absmax, state.absmax)
    assert quantize_nf4(weight, nested=False).nested is None
    assert torch.equal(quantize_nf4(weight.t()).packed, quantize_nf4(weight.t().contiguous()).packed)
    error = (reference(q).float() - weight.float()).square().mean().sqrt() / weight.float().square().mean().sqrt()
    assert 0.05 < error < 0.12
    for bad, blocksize in ((weight[0], 64), (weight.double(), 64), (weight, 100)):
        with pytest.raises(ModelError, match="expected"):
            quantize_nf4(bad, blocksize=blocksize)


def test_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ModelError, match="without a quantisation state"):
        from_params4bit(torch.zeros(4, 4))
    packed, state = quantized(8, 128, torch.float32)
    with pytest.raises(ModelError, match=r"packed has 511 elements of torch.uint8, expected 512"):
        from_quant_state(packed[:-1], state)
    with pytest.raises(ModelError, match=r"packed (is not contiguous|has)"):
        from_quant_state(packed.expand(-1, 2), state)
    state.state2.absmax = state.state2.absmax.half()
    with pytest.raises(ModelError, match=r"nested absmax has 1 elements of torch.float16, expected 1 of torch.float32"):
        from_quant_state(packed, state)
    state.quant_type = "af4"
    with pytest.raises(ModelError, match="af4"):
        from_quant_state(packed, state)
    state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="repacked"):
        from_quant_state(packed, state)


def test_nested_blocksize_is_followed() -> None:
    packed, state = quantized(40, 1024, torch.float32)
    q = from_quant_state(packed, state)
    assert q.nested is not None
    finer = replace(q, nested=replace(q.nested, blocksize=128, absmax=q.nested.absmax.repeat_interleave(2)))
    assert torch.equal(reference(q), reference(finer))


def test_int8() -> None:
    weight = random(24, 96, dtype=torch.float16, device=CPU, seed=0, scale=0.1)
    quantised, absmax, _ = bnb.int8_vectorwise_quant(weight)
    got = dequantize_int8(quantised, absmax)
    torch.testing.assert_close(got.double(), quantised.double() * absmax.double()[:, None] / 127, rtol=1e-6, atol=0)
    out = torch.full((24, 100), float("nan"), dtype=torch.bfloat16)
    dequantize_int8(quantised, absmax, out[:, :96])
    assert torch.equal(out[:, :96], got.bfloat16())
    assert out[:, 96:].isnan().all()
    with pytest.raises(ModelError, match="SCB"):
        dequantize_int8(weight, absmax)
