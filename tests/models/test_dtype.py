"""The dtype that `auto` is, on devices that are not here."""

from __future__ import annotations

import pytest
import torch

from pyralis.errors import ModelError
from pyralis.models import dtype as module
from pyralis.models.dtype import DtypeName, check_dtype_name, choose_device, choose_dtype

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")


@pytest.mark.parametrize("gpu", [True], indirect=True)
@pytest.mark.parametrize(
    ("requested", "expected", "note"),
    [
        ("auto", torch.bfloat16, ""),
        ("bfloat16", torch.bfloat16, ""),
        ("float16", torch.float16, "float16 as asked; A GPU also has bfloat16"),
        ("float32", torch.float32, ""),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_a_gpu_with_bfloat16(requested: DtypeName, expected: torch.dtype, note: str) -> None:
    choice = choose_dtype(requested, GPU)
    assert choice.dtype == expected
    assert choice.note.startswith(note)


@pytest.mark.parametrize("gpu", [False], indirect=True)
@pytest.mark.usefixtures("gpu")
def test_a_gpu_without_bfloat16() -> None:
    assert choose_dtype("auto", GPU).dtype == torch.float16
    with pytest.raises(ModelError, match="has no bfloat16"):
        choose_dtype("bfloat16", GPU)


@pytest.mark.parametrize(
    ("gain", "requested", "expected"),
    [
        (0.0, "auto", torch.float32),
        (0.0, "bfloat16", torch.float32),
        (1.5, "auto", torch.float32),
        (4.0, "auto", torch.bfloat16),
        (4.0, "bfloat16", torch.bfloat16),
        (4.0, "float32", torch.float32),
        (4.0, "float16", torch.float32),
    ],
)
def test_a_cpu(monkeypatch: pytest.MonkeyPatch, gain: float, requested: DtypeName, expected: torch.dtype) -> None:
    monkeypatch.setattr(module, "cpu_bfloat16_gain", lambda: gain)
    choice = choose_dtype(requested, CPU)
    assert choice.dtype == expected
    changed = requested not in ("auto", str(expected).removeprefix("torch."))
    assert bool(choice.note) == (changed or expected == torch.bfloat16)


def test_the_gain_is_measured_only_where_there_are_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cpu_has", lambda probe: False)
    assert module.cpu_bfloat16_gain.__wrapped__() == 0.0
    monkeypatch.setattr(module, "_cpu_has", lambda probe: True)
    assert module.cpu_bfloat16_gain.__wrapped__() > 0


def test_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ModelError, match=r"2 GPU\(s\) are visible"):
        choose_device()


def test_names() -> None:
    assert check_dtype_name("bfloat16") == "bfloat16"
    with pytest.raises(ModelError, match="expected one of auto, float32"):
        check_dtype_name("bf16")
