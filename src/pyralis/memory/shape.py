"""A model in the numbers that memory and time follow from: `describe_model` reads them from its modules.

The modules may be on the `meta` device: then nothing is loaded, and `Assumed` says what the loaded ones would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from pyralis.errors import ModelError
from pyralis.models.adapters import LinearState, compute_dtype, read_linear
from pyralis.models.detect import Reason
from pyralis.models.final_norm import has_fast_norm
from pyralis.models.gradient_sums import is_narrow
from pyralis.models.group_state import LayoutOptions, group_layout
from pyralis.models.host_embedding import embedding_on_host
from pyralis.models.layer_state import look_again
from pyralis.models.spec import LayerSpec
from pyralis.models.wide_residual import stream_dtype
from pyralis.models.workspace import ALIGNMENT
from pyralis.ops._triton import Gpu
from pyralis.ops.lora_group import LoraGroup

BLOCK = 64  # weights that share one absmax; 256 of those share one float32 where scales are quantised too
NESTED_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Assumed:
    """What a model would be loaded as. four_bit: its layers in NF4; double_quant: their scales in 8 bits."""

    four_bit: bool
    double_quant: bool = True
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Linear layers that share their input. wide: LoRA's B lies beside W, and A below it.

    trains_A, trains_B: whether any of them is; trains_base: whether W is; trains_magnitude: DoRA's.
    """

    group: LoraGroup
    wide: bool
    trains_A: bool
    trains_B: bool
    trains_base: bool
    trains_magnitude: bool = False

    @property
    def reads_input(self) -> bool:
        """Whether the backward needs the layers' input."""
        return self.trains_A or self.trains_base

    def kept_width(self, *, keep: bool) -> int:
        """Columns of the input that the backward is given: with `keep` all, where it reads them; else LoRA's."""
        if keep and self.reads_input:
            return self.group.width
        return self.group.rank if self.trains_B else 0

    @property
    def rows(self) -> int:
        return self.group.height if self.wide else self.group.out_features

    @property
    def columns(self) -> int:
        return self.group.width if self.wide else self.group.in_features

    @property
    def weights(self) -> int:
        return self.group.in_features * self.group.out_features

    @property
    def copied(self) -> int:
        """Elements of LoRA's compute copies: A padded, and B where it does not lie beside W."""
        beside = 0 if self.wide else sum(p.out_features * p.rank for p in self.group.projections)
        return self.group.pad * self.group.in_features + beside


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer. groups: qkv, attention_out, gate_up, down.

    element_size: bytes of what products are made in; residual_size: of the residual stream. stored: bytes of all its
    parameters but adapters'. made: whether matrices are dequantised or cast for each use; four_bit: dequantised.
    gpu: what launches of kernels are chosen by. tile_sums: bytes of the float32 sums of narrower gradients where the
    MLP runs in tiles.
    """

    spec: LayerSpec
    groups: tuple[GroupShape, GroupShape, GroupShape, GroupShape]
    element_size: int
    residual_size: int
    stored: int
    made: bool
    four_bit: bool
    gpu: Gpu
    tile_sums: int = 0

    @property
    def runs_in_tiles(self) -> bool:
        """Whether the MLP can run in tiles of tokens."""
        return not any(group.group.has_dropout for group in self.groups[2:])

    @cached_property
    def weights(self) -> int:
        return sum(group.weights for group in self.groups)

    @cached_property
    def matrices(self) -> int:
        """Bytes of the matrices that are made, as `workspace.py` lays them out; 0 where none are."""
        return sum(self._matrices)

    @cached_property
    def largest_matrix(self) -> int:
        """Of those, where each takes the place of the one before."""
        return max(self._matrices)

    @property
    def _matrices(self) -> list[int]:
        made = self.element_size if self.made else 0
        return [made * (-(-g.rows * g.columns // ALIGNMENT) * ALIGNMENT) for g in self.groups]


@dataclass(frozen=True)
class ModelShape:
    """A causal LM.

    Attributes:
        layers: its decoder layers in order.
        vocabulary: rows of the head.
        outside: bytes of embeddings, head and norms outside the layers, what is in host memory left out.
        trained: number of trained parameters; trained_bytes: their size.
        head_trained: whether the head's weight is trained.
        fused_norm: whether the last norm is, or will be (`models/final_norm.py`), and not stock's.
    """

    layers: tuple[LayerShape, ...]
    vocabulary: int
    outside: int
    trained: int
    trained_bytes: int
    adapters: int  # bytes of LoRA's parameters
    head_trained: bool
    head_size: int  # bytes of an element of the head
    fused_norm: bool = True

    @property
    def hidden_size(self) -> int:
        return self.layers[0].spec.hidden_size

    @property
    def element_size(self) -> int:
        return self.layers[0].element_size


def describe_model(
    causal: Any, layers: Sequence[nn.Module], gpu: Gpu, *, assumed: Assumed | None = None,
    autocast: torch.dtype | None = None,
) -> ModelShape:  # fmt: skip
    """causal: a causal LM, LoRA attached; layers: those of its decoder, made fast or not. autocast: its dtype if on.

    Raises ModelError where a layer runs stock, with the reason: what stock keeps is not known.
    """
    embedded = causal.get_input_embeddings().weight.dtype if assumed is None else assumed.dtype
    shapes: list[LayerShape] = []
    known: dict[LayerShape, LayerShape] = {}  # layers that are alike are one object
    for index, layer in enumerate(layers):
        found = look_again(layer)[1]
        if isinstance(found, Reason):
            raise ModelError(f"layer {index} runs stock ({found}), and what it keeps is not known")
        residual = stream_dtype(layer, embedded).itemsize
        shape = _layer(layer, found, gpu, residual, assumed, autocast)
        shapes.append(known.setdefault(shape, shape))
    head, stream = causal.get_output_embeddings(), stream_dtype(layers[0], embedded)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = {id(p): p for p in causal.parameters() if id(p) not in inside}
    if embedding_on_host(causal):
        del outside[id(causal.get_input_embeddings().weight)]
    named = list(causal.named_parameters())
    trained = [p for _, p in named if p.requires_grad]
    size = None if assumed is None else assumed.dtype.itemsize
    return ModelShape(
        tuple(shapes),
        head.weight.shape[0],
        sum(p.numel() * (p.element_size() if size is None or p.requires_grad else size) for p in outside.values()),
        sum(p.numel() for p in trained),
        sum(p.numel() * p.element_size() for p in trained),
        sum(p.numel() * p.element_size() for name, p in named if "lora_" in name),
        any(p.requires_grad for p in head.parameters()),
        head.weight.element_size() if size is None else size,
        has_fast_norm(causal.model, stream, None if assumed is None else assumed.dtype),
    )


def _layer(
    layer: Any, spec: LayerSpec, gpu: Gpu, residual: int, assumed: Assumed | None, autocast: torch.dtype | None
) -> LayerShape:
    linears = {p.path: read_linear(layer.get_submodule(p.path), p) for p in spec.projections}
    first = linears[spec.projections[0].path]
    norm = layer.get_submodule(spec.input_norm.path).weight
    four_bit = first.four_bit if assumed is None else assumed.four_bit
    trains_base = any(linear.base.weight.requires_grad for linear in linears.values())
    dtype = compute_dtype(list(linears.values()), norm.dtype, autocast) if assumed is None else assumed.dtype
    made = four_bit or first.base.weight.dtype != dtype if assumed is None or trains_base else four_bit
    groups = []
    for parts in (spec.qkv, (spec.attention_out,), spec.gate_up, (spec.down,)):
        own = [linears[p.path] for p in parts]
        group, wide = group_layout(parts, own, dtype, LayoutOptions(), gpu, four_bit=four_bit or made)
        adapters = [linear.adapter for linear in own if linear.adapter is not None]
        groups.append(
            GroupShape(
                group, wide, any(a.A.requires_grad for a in adapters), any(a.B.requires_grad for a in adapters),
                any(linear.base.weight.requires_grad for linear in own),
                any(a.magnitude is not None and a.magnitude.requires_grad for a in adapters),
            )
        )  # fmt: skip
    qkv, attention_out, gate_up, down = groups
    weights = {id(linear.base.weight) for linear in linears.values()}
    rest = [p for name, p in layer.named_parameters() if "lora_" not in name and id(p) not in weights]
    stored = sum(_stored(linear, assumed) for linear in linears.values())
    stored += sum(p.numel() * (p.element_size() if assumed is None else assumed.dtype.itemsize) for p in rest)
    return LayerShape(
        spec, (qkv, attention_out, gate_up, down), dtype.itemsize, residual, stored, made, four_bit, gpu,
        _tile_sums(layer, spec),
    )  # fmt: skip


def _tile_sums(layer: nn.Module, spec: LayerSpec) -> int:
    paths = [p.path for p in (*spec.gate_up, spec.down)]
    paths += [norm.path for norm in (spec.pre_mlp_norm, spec.post_mlp_norm) if norm is not None]
    trained = [p for path in paths for p in layer.get_submodule(path).parameters() if p.requires_grad]
    return sum(4 * p.numel() for p in trained if is_narrow(p))


def _stored(linear: LinearState, assumed: Assumed | None) -> int:
    """Bytes of a weight as it lies in memory, with its scales."""
    weight: Any = linear.base.weight
    if assumed is not None:
        if assumed.four_bit:
            return four_bit_bytes(weight.numel(), assumed.double_quant)
        return int(weight.numel() * (weight.element_size() if weight.requires_grad else assumed.dtype.itemsize))
    if (state := getattr(weight, "quant_state", None)) is None:
        return int(weight.numel() * weight.element_size())
    return four_bit_bytes(state.shape.numel(), state.nested)


def four_bit_bytes(weights: int, double_quant: bool) -> int:
    """Of a matrix: half a byte each, an absmax for 64 of them in 8 bits or float32; the tables are shared."""
    blocks = -(-weights // BLOCK)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK) if double_quant else 4 * blocks
    return -(-weights // 2) + scales
