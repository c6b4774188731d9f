"""The dtype that `auto` is, on devices that are not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from pyralis.errors import ModelError
from pyralis.models import dtype as module
from pyralis.models.dtype import DtypeName, check_dtype_name, choose_device, choose_dtype

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6) if request.param else (7, 5))
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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ModelError, match=r"2 GPU\(s\) are visible"):
        choose_device()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., torch.device]]:
    """`choose_device()` with a GPU and a torch built for some."""

    def choose(capability: tuple[int, int], *archs: str) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(archs))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        module._check_kernels.cache_clear()
        return choose_device()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    yield choose
    module._check_kernels.cache_clear()


CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)])
def test_wheels_of_cuda_12_6(built: Callable[..., torch.device], capability: tuple[int, int]) -> None:
    assert built(capability, *CU126) == GPU


@pytest.mark.parametrize("capability", [(7, 5), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)])
def test_wheels_of_cuda_13(built: Callable[..., torch.device], capability: tuple[int, int]) -> None:
    assert built(capability, *CU130) == GPU


@pytest.mark.parametrize(
    ("capability", "archs", "advice"),
    [
        ((6, 1), CU130, "cu126"),
        ((7, 0), CU130, "cu126"),
        ((12, 0), CU126, "built for a newer CUDA"),
        ((10, 3), ("sm_100a", "compute_100a", "compute_103"), None),
        ((10, 3), ("sm_100a", "compute_100a"), "built for a newer CUDA"),
        ((10, 0), ("sm_100a",), None),
        ((10, 3), ("sm_100f",), None),
        ((12, 0), ("sm_100f", "compute_100f"), "built for a newer CUDA"),
        ((7, 0), (), None),  # a torch that does not say
        ((9, 4), ("gfx942",), None),
    ],
)
def test_other_builds(
    built: Callable[..., torch.device], capability: tuple[int, int], archs: tuple[str, ...], advice: str | None
) -> None:
    if advice is None:
        assert built(capability, *archs) == GPU
        return
    major, minor = capability
    with pytest.raises(ModelError, match=rf"no kernels for A GPU, .* is {major}\.{minor}; .*{advice}"):
        built(capability, *archs)


def test_names() -> None:
    assert check_dtype_name("bfloat16") == "bfloat16"
    with pytest.raises(ModelError, match="expected one of auto, float32"):
        check_dtype_name("bf16")
