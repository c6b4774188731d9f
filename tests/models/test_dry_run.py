"""Whole training steps for GPUs that are not here: on meta tensors, which hold no data, with launches recorded.

Torch refuses to mix meta tensors with a CPU's, and wrong shapes and dtypes, as it would on a GPU. What is launched is
looked at here; that each kernel compiles for each GPU is shown by `tests/ops/test_aot.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from pyralis.models.causal_lm import causal_lm_loss
from pyralis.models.checkpointing import choose_save_policy
from pyralis.models.logprobs import causal_lm_logprobs
from pyralis.models.policy import SavePolicy
from pyralis.models.surgery import accelerate, decoder_layers, report
from pyralis.ops._triton import Gpu, Launch, recording
from pyralis.train.flat_optimizer import flat_adamw
from tests.models.block_harness import FAMILIES
from tests.tiny import build_tiny_model

META = torch.device("meta")
AMPERE = (8, 0)
GPUS = {"V100": (7, 0), "T4": (7, 5), "RTX 3090": (8, 6), "RTX 4090": (8, 9), "H100": (9, 0), "RTX 5090": (12, 0)}
MULTIPLY = {"_grad_B_kernel", "glu_lora_forward_kernel", "glu_lora_backward_kernel"}  # by tl.dot, from Ampere on
LORA: dict[str, dict[str, Any]] = {
    "rank 64": {"r": 64}, "dropout": {"lora_dropout": 0.1}, "dora": {"use_dora": True},
    "biases": {"bias": "all"}, "some": {"target_modules": r".*(q_proj|qkv_proj|down_proj)"},
}  # fmt: skip
POLICIES: tuple[tuple[SavePolicy, int | None], ...] = (
    ("keep", None), ("recompute_cheap", None), ("recompute_layer", None), ("recompute_layer", 8),
)  # fmt: skip
ROWS, TOKENS = 2, 24
MOST_IN_Y_AND_Z = 65_535


@pytest.fixture(autouse=True)
def _no_autocast_of_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast knows no such device, and raises when it is asked."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": kind != "meta" and asked(kind))


def half_of(capability: tuple[int, int]) -> torch.dtype:
    return torch.bfloat16 if capability >= AMPERE else torch.float16


def ids(dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty((ROWS, TOKENS), dtype=dtype, device=META)


def batches() -> Iterator[dict[str, Any]]:
    yield {}
    yield {"attention_mask": ids(), "padding_side": "right", "sequence_lengths": [TOKENS, 7]}
    yield {"attention_mask": ids(), "padding_side": "left", "sequence_lengths": [TOKENS, TOKENS - 1]}
    yield {"position_ids": ids(), "sequence_lengths": [10, 14, TOKENS]}


def fast_model(family: str, dtype: torch.dtype, lora: dict[str, Any] | None) -> Any:
    model = build_tiny_model(family.partition("-")[0], **FAMILIES[family]).to(dtype)
    model.requires_grad_(lora is None)
    tuned: Any = model
    if lora is not None:
        tuned = get_peft_model(model, LoraConfig(**{"r": 8, "target_modules": "all-linear", **lora}))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    accelerate(model)
    return tuned.train().to(META)


def steps(model: Any, capability: tuple[int, int], **optimizer: Any) -> list[Launch]:
    """What steps with each of the batches launch, optimizer included."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with recording(Gpu(capability, 100)) as launches:
        adamw = flat_adamw(model, trained, lr=1e-4, max_norm=1.0, **optimizer)
        if half_of(capability) == torch.float16:  # as GradScaler hands them over
            adamw.grad_scale, adamw.found_inf = torch.empty((), device=META), torch.empty((), device=META)
        for batch, (policy, tile) in zip(batches(), POLICIES, strict=True):
            choose_save_policy(decoder_layers(model), policy, tile)
            items = torch.empty((), dtype=torch.int64, device=META)
            loss = causal_lm_loss(model, {"input_ids": ids(), **batch}, ids(), items, supervised_rows=20)
            loss.backward()
            assert all(p.grad is not None and p.grad.is_meta for p in trained)
            adamw.step()
            adamw.zero_grad()
    assert all(layer.fast for layer in report(model).layers), report(model).lines
    return launches


def fault(launch: Launch, capability: tuple[int, int]) -> str | None:
    """Why a GPU could not do this."""
    name = launch.kernel.__name__
    tensors = [argument for argument in launch.args if isinstance(argument, Tensor)]
    if any(not tensor.is_meta for tensor in tensors):
        return f"{name} gets a tensor of the CPU"
    if max(launch.grid[1:], default=1) > MOST_IN_Y_AND_Z:
        return f"{name}'s grid is {launch.grid}"
    if capability < AMPERE and name in MULTIPLY:
        return f"{name} uses tensor cores as Triton has them from Ampere on"
    if capability < AMPERE and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return f"{name} gets bfloat16"
    return None


def check(launches: list[Launch], capability: tuple[int, int]) -> set[str]:
    faults = {found for launch in launches if (found := fault(launch, capability)) is not None}
    assert not faults
    return {launch.kernel.__name__ for launch in launches}


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu(gpu: str) -> None:
    capability = GPUS[gpu]
    names = check(steps(fast_model("llama", half_of(capability), {}), capability), capability)
    assert "adamw_kernel" in names
    assert names & MULTIPLY == (MULTIPLY if capability >= AMPERE else set())


@pytest.mark.parametrize("gpu", ["T4", "H100"])
@pytest.mark.parametrize("lora", LORA)
def test_every_adapter(lora: str, gpu: str) -> None:
    capability = GPUS[gpu]
    check(steps(fast_model("llama", half_of(capability), LORA[lora]), capability), capability)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_float16(family: str) -> None:
    check(steps(fast_model(family, torch.float16, {}), GPUS["V100"]), GPUS["V100"])


@pytest.mark.parametrize("gpu", ["T4", "H100"])
def test_chosen_tokens(gpu: str) -> None:
    """As DPO asks for them, entropies included."""
    capability = GPUS[gpu]
    model = fast_model("gemma2", half_of(capability), {})
    rows = torch.empty(9, dtype=torch.int64, device=META)
    with recording(Gpu(capability, 100)) as launches:
        for batch in batches():
            found = causal_lm_logprobs(model, {"input_ids": ids(), **batch}, rows, rows, with_statistics=True)
            assert found.logprobs.is_meta
            found.logprobs.sum().backward()
    check(launches, capability)


@pytest.mark.parametrize("rounding", ["split", "stochastic"])
def test_all_weights_in_bfloat16(rounding: str) -> None:
    check(steps(fast_model("qwen3", torch.bfloat16, None), GPUS["H100"], rounding=rounding), GPUS["H100"])


def test_faults_are_seen() -> None:
    def kernel() -> None: ...

    def launch(tensor: Tensor, *grid: int) -> Launch:
        return Launch(kernel, grid, (tensor, None, 3), {}, 4, 3, True)

    narrow = torch.empty(1, dtype=torch.bfloat16, device=META)
    assert fault(launch(narrow, 1 << 20, 7), (8, 0)) is None
    assert fault(launch(narrow, 1), (7, 5)) == "kernel gets bfloat16"
    assert fault(launch(torch.empty(1), 1), (8, 0)) == "kernel gets a tensor of the CPU"
    assert "grid" in (fault(launch(narrow, 1, 1 << 16), (8, 0)) or "")
