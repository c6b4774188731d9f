"""A recorder for CPU tests that behaves as CUDA graphs do, so that what would go wrong with these goes wrong here.

Every op that the work dispatches is written down with the memory of its operands, and a replay does these ops again on
this memory: Python has no say any more. As with a graph

- the recording itself changes nothing: what it wrote to outside memory is undone;
- what it allocated holds garbage (NaN) until a replay has written it, at each replay, and wherever another recording
  of the pool may have been given the same memory;
- memory from outside has to be there still, at the same address;
- a number that Python reads from a tensor is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


class Fault(BaseException):
    """What would be wrong with a graph. No `Exception`: nothing that goes on without a recording may swallow it."""


Storage = torch.UntypedStorage
ALLOCATES = ("aten::empty", "aten::new_empty")
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::_unique")


@dataclass(frozen=True)
class Place:
    """A tensor, by where it lies."""

    key: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        return cls(key_of(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def within(self, storage: Storage) -> Tensor:
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class Op:
    function: Any
    args: Any
    kwargs: Any
    results: tuple[Place, ...]  # that lie in memory of their own; in order
    which: tuple[int, ...]  # among all that the function returns


class TapeRecorder:
    """A pool of recordings."""

    def __init__(self) -> None:
        self.tapes: list[_Tape] = []

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        for earlier in self.tapes:
            earlier.show()
        tape = _Tape(self, frozenset(key for t in self.tapes for key, s in t.inside.items() if users_of(s) > 1))
        with tape:
            work()
        tape.close()
        self.tapes.append(tape)
        for earlier in self.tapes:
            earlier.spoil()
        return tape.replay

    def wait(self) -> None:
        """Nothing runs on its own."""

    def renew(self) -> None:
        self.tapes = []

    def mend(self) -> None:
        """Nothing is left in between."""


@dataclass(eq=False)
class _Tape(TorchDispatchMode):
    pool: TapeRecorder
    protected: frozenset[int]  # memory of earlier recordings that was in use when this one began
    ops: list[Op] = field(default_factory=list)
    seen: dict[int, StorageWeakRef] = field(default_factory=dict)
    inside: dict[int, Storage] = field(default_factory=dict)  # what was allocated
    outside: dict[int, int] = field(default_factory=dict)  # addresses
    kept: list[Tensor] = field(default_factory=list)  # constants of Python's
    before: dict[int, Storage] = field(default_factory=dict)  # what is written to outside
    results: dict[int, Storage] = field(default_factory=dict)  # what the recording itself left

    def __post_init__(self) -> None:
        super().__init__()
        self._fresh: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if any(t.device.type == "meta" for t in given) or str(kwargs.get("device")) == "meta":
            return func(*args, **kwargs)
        if name.startswith(READS):
            raise RuntimeError(f"operation not permitted when stream is capturing ({name})")
        if name == "aten::lift_fresh":
            self.kept += given
        for tensor in given:
            self._meet(tensor, fresh=False)
        for tensor in self._written(func, args, kwargs):
            self._save(tensor)
        results = func(*args, **kwargs)
        self._write_down(func, args, kwargs, results)
        return results

    def _meet(self, tensor: Tensor, *, fresh: bool) -> bool:
        """Whether the memory is met for the first time."""
        key = key_of(tensor)
        if key in self.seen:
            return False
        storage = tensor.untyped_storage()
        self.seen[key] = StorageWeakRef(storage)
        if fresh:
            self._fresh.add(key)
        else:
            self.outside[key] = storage.data_ptr()
        return True

    @staticmethod
    def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        found = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = kwargs.get(argument.name) if i >= len(args) or argument.name in kwargs else args[i]
            found += [t for t in tree_flatten(value)[0] if isinstance(t, Tensor)]
        return found

    def _save(self, tensor: Tensor) -> None:
        key = key_of(tensor)
        if key not in self._fresh and key not in self.before:
            self.before[key] = tensor.untyped_storage().clone()

    def _write_down(self, func: Any, args: Any, kwargs: Any, results: Any) -> None:
        flat = [t for t in tree_flatten(results)[0] if isinstance(t, Tensor)]
        new = [i for i, t in enumerate(flat) if t.device.type != "meta" and self._meet(t, fresh=True)]
        if func._schema.name.startswith(ALLOCATES) or not (new or func._schema.is_mutable):
            return  # a view
        places = tree_map_only(Tensor, Place.of, (args, kwargs))
        self.ops.append(Op(func, *places, tuple(Place.of(flat[i]) for i in new), tuple(new)))

    def close(self) -> None:
        """The work is over: undo it."""
        needed: dict[int, int] = {}
        for op in self.ops:
            for place in tree_flatten((op.args, op.kwargs, op.results))[0]:
                if isinstance(place, Place) and place.key in self._fresh:
                    needed[place.key] = max(needed.get(place.key, 0), _end(place))
        for key, size in needed.items():
            live = None if self.seen[key].expired() else Storage._new_with_weak_ptr(key)
            if live is not None:
                self.results[key] = live.clone()
            self.inside[key] = Storage(size) if live is None else live
        for key, values in self.before.items():
            outside = Storage._new_with_weak_ptr(key)
            if outside is None:
                raise Fault("memory that was written to has gone")
            outside.copy_(values)
        self.before.clear()

    def show(self) -> None:
        """The values that another recording goes on from: a graph needs none while it is captured, this does."""
        for key, values in self.results.items():
            self.inside[key].copy_(values)

    def spoil(self, protected: frozenset[int] = frozenset()) -> None:
        """Bytes of 255: NaN as a floating-point number, -1 as an integer."""
        for key, storage in self.inside.items():
            if key not in protected:
                storage.fill_(255)

    def replay(self) -> None:
        for tape in self.pool.tapes:
            tape.spoil(self.protected)
        with torch.no_grad():
            for op in self.ops:
                args, kwargs = tree_map_only(Place, self._tensor, (op.args, op.kwargs))
                results = tree_flatten(op.function(*args, **kwargs))[0]
                tensors = [t for t in results if isinstance(t, Tensor)]
                for place, i in zip(op.results, op.which):
                    self._tensor(place).copy_(tensors[i])

    def _tensor(self, place: Place) -> Tensor:
        storage = self.inside.get(place.key)
        if storage is None:
            if self.seen[place.key].expired():
                raise Fault("a recorded step reads memory that has been given back")
            storage = Storage._new_with_weak_ptr(place.key)
            if storage.data_ptr() != self.outside[place.key]:
                raise Fault("memory that a recorded step reads has moved")
        return place.within(storage)


def key_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def users_of(storage: Storage) -> int:
    return int(torch._C._storage_Use_Count(storage._cdata))


def _end(place: Place) -> int:
    """Bytes up to the end of a tensor."""
    last = place.offset + sum((n - 1) * s for n, s in zip(place.size, place.stride)) if all(place.size) else 0
    return (last + 1) * place.dtype.itemsize
