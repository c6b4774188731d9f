"""A model as it was when putting an adapter on it failed: PEFT leaves what it had done by then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Where the block raises, `model`, without adapters before, is so again: its modules, and which weights learn.

    Weights that an adapter's start changed stay changed.
    """
    modules = dict(model.named_modules())
    learns = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        yield
    except BaseException:
        _restore(model, modules)
        for weight, learnt in learns:
            weight.requires_grad_(learnt)
        raise


def _restore(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    wrapped = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    names = [name for name, module in model.named_modules() if name in modules and isinstance(module, wrapped)]
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(modules[parent] if parent else model, own, modules[name])
    vars(model).pop("peft_config", None)
