"""Who is warned before training that stock layers may overflow float16, and who needs no warning."""

from __future__ import annotations

import pytest
import torch

from pyralis.models.float16_range import float16_warning
from pyralis.models.surgery import accelerate
from pyralis.models.wide_residual import stream_dtype
from tests.tiny import build_tiny_model


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"])
def test_a_family_that_outgrows_float16(family: str) -> None:
    model = build_tiny_model(family).half()
    warning = float16_warning(model, 0)
    assert warning is not None
    assert "hidden states leave its range (65,504)" in warning
    assert float16_warning(model, 1) == warning
    assert float16_warning(model, accelerate(model).fast_layers) is None
    layer = model.model.layers[0]
    assert stream_dtype(layer, torch.float16) == torch.float32
    assert stream_dtype(layer, torch.bfloat16) == torch.bfloat16


def test_nothing_is_said_of_others() -> None:
    for family, dtype in (("llama", torch.float16), ("gemma", torch.bfloat16), ("qwen2", torch.float32)):
        assert float16_warning(build_tiny_model(family).to(dtype), 0) is None
    assert stream_dtype(build_tiny_model("llama").model.layers[0], torch.float16) == torch.float16
    assert float16_warning(build_tiny_model("gpt2").half(), 0) is None
