from __future__ import annotations

import gc

import pytest
import torch

from pyralis.memory.offload import PinnedStore


def test_a_cpu_tensor_stays_where_it_is() -> None:
    store, tensor = PinnedStore(), torch.randn(3)
    assert store.get(store.put(tensor)) is tensor


@pytest.mark.gpu
def test_tensors_come_back_in_any_order_and_their_memory_is_free_meanwhile() -> None:
    store = PinnedStore()
    wanted = [torch.randn(1 << 18, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    handles = [store.put(tensor.cuda()) for tensor in wanted]
    torch.cuda.synchronize()
    gc.collect()
    assert torch.cuda.memory_allocated() < 2 << 20
    for index in (5, 4, 2, 3, 0):  # the last backward may also never come
        assert torch.equal(store.get(handles[index]).cpu(), wanted[index])
    del handles
    assert torch.equal(store.get(store.put(wanted[1].cuda())).cpu(), wanted[1])
