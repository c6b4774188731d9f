"""Bytes of tensors that were made in a while and are still alive, counted by storage."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Watches every op. `now()`: bytes of the storages that they made and that somebody still holds.

    peak: the most that there were after an op, since it was last set to 0. watched: whether that is looked at.
    """

    def __init__(self, *, watched: bool = False) -> None:
        super().__init__()
        self.peak, self._watched = 0, watched
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.set_:  # the interpreter's: no memory of its own
            return out
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and (storage := made.untyped_storage())._cdata not in given:
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self._watched:
            self.look()
        return out

    def look(self) -> None:
        """What is alive now counts for the peak."""
        if self._alive() > self.peak:
            gc.collect()  # what the interpreter's cycles of references hold
            self.peak = max(self.peak, self._alive())

    def __enter__(self) -> LiveBytes:
        gc.freeze()  # what was there before is never collected: a look goes through what is new alone
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        gc.unfreeze()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is alive meanwhile is not looked at; what is made is remembered."""
        watched, self._watched = self._watched, False
        try:
            yield
        finally:
            self._watched = watched

    def now(self) -> int:
        gc.collect()
        return self._alive()

    def _alive(self) -> int:
        return sum(size for reference, size in self._seen.values() if not reference.expired())
