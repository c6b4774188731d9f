"""Torch's own kernels called by argument name, so that their order and number may differ between versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch


@dataclass(frozen=True, slots=True, eq=False)
class AtenOp:
    """An op of the installed torch. None stands for an undefined tensor."""

    name: str
    overload: Any
    required: frozenset[str]
    optional: frozenset[str]
    returns: tuple[str, ...]

    def __call__(self, given: Mapping[str, Any], offered: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The results by name. `given` arguments must exist; of those `offered` the ones without default are taken."""
        missing = self._missing(tuple(given))
        if not missing:
            return dict(zip(self.returns, self.overload(**given)))
        if offered is None or (absent := [name for name in missing if name not in offered]):
            new = ", ".join(missing if offered is None else absent)
            raise RuntimeError(f"aten::{self.name} of torch {torch.__version__} has a new argument: {new}")
        taken = {name: offered[name] for name in missing}
        return dict(zip(self.returns, self.overload(**given, **taken)))

    @cache  # noqa: B019  ops live as long as the process
    def _missing(self, given: tuple[str, ...]) -> tuple[str, ...]:
        """The arguments that have to be offered where these are given."""
        if unknown := [n for n in given if n not in self.required and n not in self.optional]:
            raise RuntimeError(f"aten::{self.name} of torch {torch.__version__} takes no {', '.join(unknown)}")
        return tuple(sorted(self.required.difference(given)))


@lru_cache
def aten(name: str) -> AtenOp:
    """aten::NAME; RuntimeError where the installed torch has none."""
    if not hasattr(torch.ops.aten, name):
        raise RuntimeError(f"torch {torch.__version__} has no aten::{name}")
    overload = getattr(torch.ops.aten, name).default
    schema = overload._schema
    return AtenOp(
        name,
        overload,
        frozenset(a.name for a in schema.arguments if not a.has_default_value()),
        frozenset(a.name for a in schema.arguments if a.has_default_value()),
        tuple(r.name or str(i) for i, r in enumerate(schema.returns)),
    )
