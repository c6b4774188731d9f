"""Op tests run the kernels: interpreted on CPU tensors, compiled on a GPU (those runs carry the mark `gpu`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pyralis.ops._triton import INTERPRETED, kernels_on_cpu


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device on which public functions launch kernels."""
    if request.param == "cuda":
        yield torch.device("cuda", torch.cuda.current_device())
        return
    if not INTERPRETED:
        pytest.skip(
            "this process compiles kernels for its GPU; the interpreter needs TRITON_INTERPRET=1 from the start"
        )
    with kernels_on_cpu():
        yield torch.device("cpu")
