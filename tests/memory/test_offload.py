from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch

from pyralis.memory import offload, step_store
from pyralis.memory.offload import PinnedStore
from pyralis.memory.step_store import StepStore


@pytest.mark.parametrize("store", [PinnedStore(), StepStore()])
def test_a_cpu_tensor_stays_where_it_is(store: PinnedStore | StepStore) -> None:
    tensor = torch.randn(3)
    handle = store.put(tensor)
    store.settle()
    assert store.get(handle) is tensor


class Pretended:
    """Stands for a tensor on a GPU, or in pinned memory; counts those that are alive."""

    alive: ClassVar[weakref.WeakSet[Pretended]] = weakref.WeakSet()
    recorded = 0
    shape, dtype, device, nbytes, is_cuda = torch.Size([4]), torch.float32, torch.device("cuda", 0), 16, True

    def __init__(self, *, on_gpu: bool = True) -> None:
        if on_gpu:
            self.alive.add(self)

    def copy_(self, other: Pretended, non_blocking: bool) -> None:
        assert non_blocking

    def record_stream(self, stream: Any) -> None:
        Pretended.recorded += 1

    def numel(self) -> int:
        return self.nbytes

    def __getitem__(self, rows: slice) -> Pretended:
        return self

    def view(self, *shape: Any) -> Pretended:
        return self


class Stream:
    def __init__(self, device: Any) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self) -> object:
        return object()


@contextmanager
def nothing(stream: Any) -> Iterator[None]:
    yield


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gc.freeze()  # `held` goes through what is new alone
    now = Stream(None)
    Pretended.alive.clear()
    Pretended.recorded = 0
    for module in (offload, step_store):
        monkeypatch.setattr(
            module.torch, "empty", lambda *args, pin_memory=False, **how: Pretended(on_gpu=not pin_memory)
        )
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    yield
    gc.unfreeze()


def held() -> int:
    gc.collect()
    return len(Pretended.alive)


LAYERS = 5


def forward(store: Any) -> list[Any]:
    """Layers' inputs put away, none held by anybody else once its layer has computed."""
    handles = []
    for _ in range(LAYERS):
        x = Pretended()
        handles.append(store.put(x))
        assert held() == 1, "that of the layer that computes"
        store.settle()
        del x
        assert held() == 0
    return handles


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", [PinnedStore, StepStore])
def test_a_layer_holds_its_input_and_the_next_one_to_come(kind: type) -> None:
    store = kind()
    if isinstance(store, StepStore):
        for index in range(LAYERS):
            store.reserve(index, Pretended.nbytes)
    handles = forward(store)
    while handles:
        x = store.get(handles.pop())
        assert held() == 1 + bool(handles)
        del x
    assert (held(), Pretended.recorded) == (0, 0)


@pytest.mark.usefixtures("gpu")
def test_what_was_fetched_for_a_backward_that_never_comes_waits_for_its_copy() -> None:
    store = PinnedStore()
    handles = forward(store)
    x = store.get(handles.pop())
    assert (held(), Pretended.recorded) == (2, 0)
    handles.clear()
    assert (held(), Pretended.recorded) == (1, 1)
    del x


@pytest.mark.gpu
def test_tensors_come_back_in_any_order_and_their_memory_is_free_meanwhile() -> None:
    store = PinnedStore()
    wanted = [torch.randn(1 << 18, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    handles, before = [], torch.cuda.memory_allocated()
    for tensor in wanted:
        handles.append(store.put(tensor.cuda()))
        store.settle()
    assert torch.cuda.memory_allocated() - before < 2 << 20, "though no copy need be done yet"
    for index in (5, 4, 2, 3, 0):  # the last backward may also never come
        assert torch.equal(store.get(handles[index]).cpu(), wanted[index])
    del handles
    assert torch.equal(store.get(store.put(wanted[1].cuda())).cpu(), wanted[1])
