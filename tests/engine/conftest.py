from __future__ import annotations

import pytest
import torch

from pyralis.ops.attention_backends import BACKENDS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def attention_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's attention over packed rows reads their bounds, as no capture could."""
    monkeypatch.setitem(BACKENDS, "flash_cpu", BACKENDS["math"])
