"""The rules, for GPUs that are not here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyralis.errors import ModelError
from pyralis.ops.attention_choice import RULES, Choice, choose_backend
from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec

LLAMA = AttentionSpec(32, 8, 128, 128**-0.5)
GEMMA2 = AttentionSpec(8, 4, 256, 256**-0.5, softcap=50.0)
PADDED = AttentionLayout.padded(2, 512)
PACKED = AttentionLayout.packed(torch.tensor([0, 500, 1024], dtype=torch.int32), 524, 1024)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NO_PACKAGE = {"flash_attn": "the package flash_attn is not installed"}


def choose(
    spec: AttentionSpec = LLAMA,
    layout: AttentionLayout = PADDED,
    dtype: torch.dtype = BF16,
    capability: tuple[int, int] | None = (9, 0),
    deterministic: bool = False,
    missing: dict[str, str] = NO_PACKAGE,
) -> Choice:
    return choose_backend(spec, layout, dtype, capability, deterministic, missing)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_newer_gpus(capability: tuple[int, int]) -> None:
    windowed = replace(LLAMA, window=100)
    assert choose(capability=capability).name == "cudnn"
    assert choose(layout=PACKED, capability=capability).name == "flash"
    assert choose(windowed, capability=capability).name == "flash"
    assert choose(windowed, PACKED, capability=capability).name == "flash"
    assert choose(deterministic=True, capability=capability).name == "flash"
    assert choose(dtype=FP32, capability=capability).name == "efficient"
    assert choose(GEMMA2, capability=capability).name == "flex"
    assert choose(GEMMA2, capability=capability, missing={}).name == "flash_attn"
    assert choose(replace(GEMMA2, softcap=None), capability=(9, 0)).name == "cudnn"
    assert choose(replace(GEMMA2, softcap=None), capability=(8, 0)).name == "flash"


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5)])
def test_older_gpus(capability: tuple[int, int]) -> None:
    for layout in (PADDED, PACKED):
        assert choose(layout=layout, dtype=FP16, capability=capability).name == "efficient"
        assert choose(replace(LLAMA, window=100), layout, FP16, capability).name == "efficient"
        assert choose(GEMMA2, layout, FP16, capability).name == "math"
        assert choose(layout=layout, dtype=BF16, capability=capability).name == "math"
    reason = choose(dtype=FP16, capability=capability).why_not("cudnn")
    assert reason == f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, torch.float64])
def test_cpu(dtype: torch.dtype) -> None:
    choice = choose(dtype=dtype, capability=None)
    assert choice.name == "flash_cpu"
    assert choice.alternatives == ("math",)
    assert choose(GEMMA2, dtype=dtype, capability=None).name == "math"


def test_every_backend_is_accounted_for() -> None:
    for capability in (None, (7, 0), (9, 0)):
        choice = choose(GEMMA2, PACKED, capability=capability, deterministic=True)
        assert {choice.name, *choice.alternatives, *(r.backend for r in choice.rejected)} == set(RULES)
        assert all(r.reason for r in choice.rejected)


def test_reasons() -> None:
    choice = choose(GEMMA2, deterministic=True)
    assert choice.why_not("flash") == "has no softcap"
    assert choice.why_not("flash_attn") == NO_PACKAGE["flash_attn"]
    assert choice.why_not("flex") is None
    assert "deterministic" in str(choose(deterministic=True).why_not("cudnn"))
    assert "window" in str(choose(replace(LLAMA, window=7)).why_not("cudnn"))
    assert "variable lengths" in str(choose(layout=PACKED).why_not("cudnn"))
    assert "float64" in str(choose(dtype=torch.float64).why_not("efficient"))
    assert "head dimension 100" in str(choose(replace(LLAMA, head_dim=100)).why_not("flash"))
    assert "2 tokens" in str(choose(layout=AttentionLayout.padded(4, 1)).why_not("cudnn"))


def test_what_failed_here_is_not_taken() -> None:
    choice = choose(missing={**NO_PACKAGE, "cudnn": "failed when tried: no engine"})
    assert choice.name == "flash"
    assert choice.why_not("cudnn") == "failed when tried: no engine"


def test_a_window_as_wide_as_the_rows_is_none() -> None:
    assert choose(replace(LLAMA, window=512)).name == "cudnn"
    assert choose(replace(LLAMA, window=511)).name == "flash"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_kv_heads": 5}, "num_key_value_heads"),
        ({"window": 0}, "sliding_window"),
        ({"window": 8, "causal": False}, "sliding_window"),
        ({"softcap": 0.0}, "attn_logit_softcapping"),
    ],
)
def test_impossible_specs(changes: dict[str, int], names: str) -> None:
    with pytest.raises(ModelError, match=names):
        replace(LLAMA, **changes)


def test_left_padded_rows_are_sequences() -> None:
    layout = AttentionLayout.left_padded(torch.tensor([2, 0, 5]), 6)
    assert layout.cu_seqlens is not None
    assert layout.cu_seqlens.tolist() == [0, 2, 6, 6, 12, 17, 18]
    assert layout.documents().tolist() == [0] * 2 + [1] * 4 + [3] * 6 + [4] * 5 + [5]
    assert (layout.tokens, layout.max_seqlen) == (18, 6)
