"""One decoder layer's weights as the fused block reads them, kept in step with the modules they belong to.

`refresh` is called at the start of each forward of the model, when adapters may have been switched, disabled, moved or
changed by an optimizer: it reads the modules again (`adapters.py`), rebuilds what no longer fits and copies the float32
adapters into their compute copies. Every layout that a state of the modules asks for is a `LayerState`; a backward goes
on with the state that its forward had.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyralis.errors import ModelError
from pyralis.models.adapters import LinearState, compute_dtype, glance, read_linear
from pyralis.models.arena import Base, DenseBase
from pyralis.models.group_state import GroupState, LayoutOptions, add_biases, build_group, fixed_copies
from pyralis.models.residency import Residency, residency
from pyralis.models.spec import LayerSpec, NormSpec
from pyralis.models.workspace import CastBase, FourBitBase, Workspace, WorkspaceBase

STREAMS = 16  # of dropout masks a layer, at least one for each adapter
KEPT_STATES = 4  # training, evaluation, adapters disabled, a second adapter


@dataclass(frozen=True, slots=True, eq=False)
class LayerState:
    """A layer's weights under one state of its adapters."""

    qkv: GroupState
    attention_out: GroupState
    gate_up: GroupState
    down: GroupState
    base: Base
    plan: Any  # of the base
    norms: dict[str, tuple[nn.Parameter, nn.Parameter | None]]  # by path: weight, bias
    parameters: tuple[nn.Parameter, ...]  # all that are trained
    dtype: torch.dtype  # of products
    targets: list[Tensor]  # what a refresh copies to, and from
    sources: list[Tensor]
    adding: list[GroupState]  # groups whose biases it adds up

    @property
    def device(self) -> torch.device:
        return self.qkv.linears[0].base.weight.device  # type: ignore[no-any-return]

    @property
    def has_dropout(self) -> bool:
        return any(group.group.has_dropout for group in self.groups)

    @property
    def groups(self) -> tuple[GroupState, GroupState, GroupState, GroupState]:
        return self.qkv, self.attention_out, self.gate_up, self.down


class LayerWeights:
    """The weights of `layer`, which `spec` describes.

    index: which layer of its model, so that dropout differs between layers. workspace: shared by a model's layers.
    A copy or a pickle of it holds no buffers and builds its own when it is first used.
    """

    def __init__(
        self,
        layer: nn.Module,
        spec: LayerSpec,
        *,
        index: int = 0,
        workspace: Workspace | None = None,
        options: LayoutOptions | None = None,
    ) -> None:
        self.layer, self.spec, self.index = layer, spec, index
        self.workspace = Workspace() if workspace is None else workspace
        self.options = LayoutOptions() if options is None else options
        self._forget()

    def _forget(self) -> None:
        self._bases: dict[type, Base] = {}
        self._states: dict[Hashable, LayerState] = {}
        self._state: LayerState | None = None
        self._homes: dict[str, tuple[nn.Module, str]] = {}
        self._residency: Residency = "kept" if self.options.resident else "at once"
        self._seen: tuple[list[Any], LayerState] | None = None

    def __getstate__(self) -> dict[str, Any]:
        names = ("layer", "spec", "index", "workspace", "options")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def served(self) -> bool:
        """Whether the last `refresh` found a layer that the fused block computes."""
        return self._state is not None

    @property
    def state(self) -> LayerState:
        """As of the last `refresh`."""
        if self._state is None:
            self.refresh()
        assert self._state is not None
        return self._state

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What is trained, in the order in which flat buffers should have it."""
        return self.state.parameters

    def matrices(self, state: LayerState) -> Sequence[Tensor]:
        """Four matrices [N + P, K + P] or [N, K], valid until another layer asks for its own; in turn, until another
        one of them is asked for."""
        return state.base.matrices(state.groups, state.plan)

    def keep_matrices(self, state: LayerState) -> None:
        """Make what serves many uses, for a recorded step that does not make it itself."""
        if not state.base.kept(state.groups, state.plan):
            self.matrices(state)

    def forget_matrices(self, *, resident: bool) -> None:
        for base in self._bases.values():
            base.forget(resident=resident)

    @torch.no_grad()
    def release(self) -> None:
        """Give plain weights contiguous memory of their own again, and drop all buffers; `refresh` lays out anew."""
        for projection in self.spec.projections:
            try:
                weight = read_linear(self._module(projection.path), projection).base.weight
            except ModelError:
                continue
            if weight.untyped_storage().nbytes() > weight.numel() * weight.element_size():
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        self._forget()

    def refresh(self, autocast: torch.dtype | None = None) -> None:
        """Read the modules and bring all copies up to date. Raises ModelError where the block does not serve them.

        autocast: the dtype that plain weights are multiplied in, where autocast is on and to be heeded.
        """
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        with torch.no_grad():
            self.look(autocast)
            self.collect(targets, sources)
            if targets:
                torch._foreach_copy_(targets, sources)

    def look(self, autocast: torch.dtype | None = None) -> None:
        """The first half of `refresh`, without gradients: read the modules. A device does nothing, but where something
        has to be laid out anew."""
        self._state = None
        seen = self._glance(autocast)
        if self._seen is not None and self._seen[0] == seen:
            state = self._seen[1]
        else:
            state = self._read(autocast)
            self._seen = self._glance(autocast), state  # laying out moves plain weights
        self._state = state

    def collect(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """The second half: what is left to copy is appended to the lists, so that one launch serves a model."""
        state = self.state
        for base in self._bases.values():
            base.adapters_changed()
        for group in state.adding:
            add_biases(group)
        targets += state.targets
        sources += state.sources

    def _glance(self, autocast: torch.dtype | None) -> list[Any]:
        """Equal for as long as `_read` would find the same."""
        found: list[Any] = [autocast, residency(self.layer)]
        with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' parameters have one, which takes a microsecond
            for projection in self.spec.projections:
                found += glance(self._module(projection.path))
            for norm in self.spec.norms:
                found += glance(self._module(norm.path))
        return found

    def _read(self, autocast: torch.dtype | None) -> LayerState:
        """The state of the modules as they are, laid out anew if it was not before."""
        self._seen = None
        self._follow_residency()
        linears = [read_linear(self._module(p.path), p) for p in self.spec.projections]
        norms = {norm.path: self._norm(norm) for norm in self.spec.norms}
        key = self._key(linears, norms, autocast)
        state = self._states.pop(key, None)
        if state is None:
            state = self._build(linears, norms, autocast)
            key = self._key(linears, norms, autocast)  # building moves plain weights
        self._states[key] = state  # the last one used is the last one dropped
        while len(self._states) > KEPT_STATES:
            del self._states[next(iter(self._states))]
        return state

    def _module(self, path: str) -> Any:
        home = self._homes.get(path)
        if home is None:
            parent, _, name = path.rpartition(".")
            home = self._homes[path] = self.layer.get_submodule(parent), name
        return home[0]._modules[home[1]]

    def _norm(self, norm: NormSpec) -> tuple[nn.Parameter, nn.Parameter | None]:
        module = self._module(norm.path)
        weight = module._parameters.get("weight")
        if weight is None:
            raise ModelError(f"{norm.path} is a {type(module).__name__} without a weight of its own")
        return weight, module._parameters.get("bias")

    def _key(self, linears: list[LinearState], norms: dict[str, Any], autocast: torch.dtype | None) -> Hashable:
        found = tuple((id(p), p.data_ptr(), p.requires_grad) for pair in norms.values() for p in pair if p is not None)
        return tuple(linear.key for linear in linears), found, autocast

    def _build(self, linears: list[LinearState], norms: dict[str, Any], autocast: torch.dtype | None) -> LayerState:
        dtype = compute_dtype(linears, norms[self.spec.input_norm.path][0].dtype, autocast)
        by_path = {linear.path: linear for linear in linears}
        groups, stream = [], self.index * STREAMS
        for parts in (self.spec.qkv, (self.spec.attention_out,), self.spec.gate_up, (self.spec.down,)):
            groups.append(build_group(parts, [by_path[p.path] for p in parts], dtype, stream, self.options))
            stream += len(parts)
        base = self._base_of(linears[0], dtype)
        plan = base.prepare(groups, dtype)
        trained = [p for group in groups for p in group.trained.parameters]
        trained += [p for pair in norms.values() for p in pair if p is not None and p.requires_grad]
        qkv, attention_out, gate_up, down = groups
        copies = [pair for group in groups for pair in fixed_copies(group)]
        return LayerState(
            qkv, attention_out, gate_up, down, base, plan, norms, tuple(trained), dtype,
            [to for to, _ in copies], [source for _, source in copies], [g for g in groups if g.adds_biases],
        )  # fmt: skip

    def _base_of(self, linear: LinearState, dtype: torch.dtype) -> Base:
        kind: type[WorkspaceBase] = FourBitBase if linear.four_bit else CastBase
        if not linear.four_bit and linear.base.weight.dtype == dtype:
            return self._bases.setdefault(DenseBase, DenseBase())
        return self._bases.setdefault(kind, kind(self.workspace, self._residency))

    def _follow_residency(self) -> None:
        """Workspaces of the other kind are given up."""
        chosen: Residency = "kept" if self.options.resident else residency(self.layer)
        if chosen != self._residency:
            self._residency = chosen
            self._states = {k: state for k, state in self._states.items() if isinstance(state.base, DenseBase)}
            self._bases = {kind: base for kind, base in self._bases.items() if kind is DenseBase}
