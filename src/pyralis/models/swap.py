"""A module made fast and back, one instance at a time: `module.__class__` becomes a subclass made for its class.

Two models in one process can differ, nothing is patched on a class or a module, and parameters, state-dict keys, hooks,
`isinstance`, `generate`, PEFT and saving go on working. An instance attribute `forward` would not do: from transformers
5.23 on it silently turns gradient checkpointing off.

The subclass keeps `__name__`, `__qualname__` and `__module__` of the stock class: `config.json` records the name, FSDP
wraps by it, and transformers' output recorder looks a class up by `str(class)`. So pickle cannot find it by name, and
`__reduce_ex__` has it made anew. What the fast path keeps with a module (`FAST_STATE`) is neither copied nor pickled: a
copy makes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import nn

from pyralis.compat import CACHE_ARGUMENTS

STOCK_CLASS = "_pyralis_stock_class"
FAST_STATE = "_pyralis_state"

Forward = Callable[..., Any]


def stock_class(cls: type) -> type:
    """The class that a fast one stands for; any other class itself."""
    return getattr(cls, STOCK_CLASS, cls)


def is_fast(module: nn.Module) -> bool:
    return hasattr(type(module), STOCK_CLASS)


def swap(module: nn.Module, forward: Forward) -> None:
    """Let `forward(module, *args, **kwargs)` run in place of the module's own.

    forward: a function at the top level of a Python module, so that it can be pickled. It reaches the stock one through
    `call_stock`.
    """
    restore_module(module)
    cls: Any = type(module)
    module.__class__ = _fast_class(cls, forward)


def restore_module(module: nn.Module) -> bool:
    """Give a fast module its stock class back; whether it was one."""
    vars(module).pop(FAST_STATE, None)
    if not is_fast(module):
        return False
    module.__class__ = stock_class(type(module))
    return True


def fast_modules(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if is_fast(module))


def call_stock(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The stock forward of a fast module, under gradient checkpointing where that is on.

    transformers applies checkpointing in `__call__` (5.17) or around `forward` (5.23), for the outermost class only:
    the fast class takes neither over, because its own forward knows better what to keep.
    """
    stock: Any = stock_class(type(module))
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if checkpoint is None or not (is_checkpointed(module) and args):
        return stock.forward(module, *args, **kwargs)
    for name in {"use_cache", *CACHE_ARGUMENTS} & set(kwargs):  # a cache would be written to twice
        kwargs[name] = False if name == "use_cache" else None
    return checkpoint(partial(stock.forward, module, **kwargs), *args)


def is_checkpointed(layer: nn.Module) -> bool:
    """Whether gradient checkpointing is on for a layer that is being trained.

    Not without gradients, where it would only take `generate` the cache that it needs.
    """
    return bool(layer.training and getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled())


@cache
def _fast_class(stock: Any, forward: Forward) -> type:
    @wraps(stock.forward)  # Trainer picks a data set's columns by its signature, `generate` what it may pass
    def forward_with_signature(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    namespace: dict[str, Any] = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "__doc__": stock.__doc__,
        "__call__": nn.Module.__call__,  # 5.17 checkpoints in its own
        "__reduce_ex__": _reduce,
        "forward": forward_with_signature,
        STOCK_CLASS: stock,
        "_pyralis_forward": staticmethod(forward),
    }
    fast = type(stock.__name__, (stock,), namespace)
    fast.forward = forward_with_signature  # type: ignore[attr-defined]  # 5.23 has wrapped it
    return fast


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    cls: Any = type(module)
    state = {name: value for name, value in vars(module).items() if name != FAST_STATE}
    return _rebuild, (stock_class(cls), cls._pyralis_forward), state


def _rebuild(stock: Any, forward: Forward) -> nn.Module:
    fast: Any = _fast_class(stock, forward)
    return fast.__new__(fast)
