"""The block that runs fast layers: one that is exact by definition, so that whatever differs is the swap's fault, and
the fused one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.models.fast_models import Block
from tests.models.spec_block import CountedFused, SpecBlock, block_in_place


@pytest.fixture(params=[SpecBlock, CountedFused])
def block(request: pytest.FixtureRequest) -> Iterator[Block]:
    with block_in_place(request.param()) as counted:
        yield counted
