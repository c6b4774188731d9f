"""What a decoder layer computes, in one frozen description that the fused block reads (`block.py`).

    a = x + m * post_attention_norm(O(attention(rope(qk_norm(QKV(input_norm(x)))))))
    y = a + m * post_mlp_norm(D(act(G(pre_mlp_norm(a))) * U(pre_mlp_norm(a))))

QKV, O, G, U and D are linear layers, m is `residual_multiplier`; norms that a family lacks are left out. Paths are
those of the modules inside the decoder layer, for `layer.get_submodule(path)`; PEFT may have wrapped what is there.

`detect.py` makes one from a config and modules. A spec says nothing of dtypes, quantisation or adapters: those are read
from the modules when weights are laid out (`weights.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from pyralis.errors import ModelError
from pyralis.ops.attention_spec import AttentionSpec
from pyralis.ops.glu import Activation

__all__ = ["Activation", "AttentionSpec", "LayerSpec", "NormKind", "NormSpec", "Projection"]

NormKind = Literal["rms", "layer"]


@dataclass(frozen=True)
class NormSpec:
    """A norm over the last dimension.

    Attributes:
        path: its module, such as "input_layernorm". Weight and, of a layer norm, bias are read there.
        eps: added to the mean square or the variance.
        kind: "rms" or "layer".
        unit_offset: Gemma's: multiplies by 1 + weight in float32 and rounds once at the end; RMS only. Without it the
            normalised value is rounded to the dtype first, as Llama does.
    """

    path: str
    eps: float
    kind: NormKind = "rms"
    unit_offset: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("rms", "layer"):
            raise ModelError(f"{self.path}: norm kind {self.kind!r}; expected 'rms' or 'layer'")
        if not self.eps >= 0:
            raise ModelError(
                f"{self.path}: eps = {self.eps}; expected 0 or a positive number in the model's config.json"
            )
        if self.unit_offset and self.kind != "rms":
            raise ModelError(f"{self.path}: a unit offset belongs to an RMS norm, not to a {self.kind} norm")


@dataclass(frozen=True)
class Projection:
    """A linear layer y = x W^T + b with W [out_features, in_features].

    Attributes:
        path: its module, such as "self_attn.q_proj".
        bias: whether it has b.
    """

    path: str
    out_features: int
    in_features: int
    bias: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """A decoder layer.

    Attributes:
        hidden_size: width of the residual stream.
        intermediate_size: width between gate/up and down.
        attention: heads, head size, scale, causality, window and softcap.
        rotary_dim: the first columns of each head that are rotated: head_dim, or fewer (Phi-4-mini).
        input_norm: before q, k and v.
        pre_mlp_norm: before gate and up. Llama's modules call it "post_attention_layernorm".
        activation: of the gate: "silu", "gelu_tanh" or "gelu".
        qkv: the projections of q, k and v in that order, or one that yields [q | k | v] (Phi-3).
        attention_out: from heads to the residual stream.
        gate_up: the projections of gate and up in that order, or one that yields [gate | up] (Phi-3).
        down: from the intermediate size to the residual stream.
        q_norm, k_norm: RMS norms of each head before RoPE (Qwen3, Gemma 3), both or neither, alike but for the weight.
        post_attention_norm: on the attention's output before the residual addition (Gemma 2 and 3).
        post_mlp_norm: on the MLP's output before the residual addition (Gemma 2 and 3).
        residual_multiplier: factor of both branches before the residual addition (Granite).
    """

    hidden_size: int
    intermediate_size: int
    attention: AttentionSpec
    rotary_dim: int
    input_norm: NormSpec
    pre_mlp_norm: NormSpec
    activation: Activation
    qkv: tuple[Projection, ...]
    attention_out: Projection
    gate_up: tuple[Projection, ...]
    down: Projection
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    post_attention_norm: NormSpec | None = None
    post_mlp_norm: NormSpec | None = None
    residual_multiplier: float = 1.0

    def __post_init__(self) -> None:
        if self.activation not in ("silu", "gelu_tanh", "gelu"):
            raise ModelError(f"activation {self.activation!r}; expected 'silu', 'gelu_tanh' or 'gelu'")
        head_dim = self.attention.head_dim
        if not 0 < self.rotary_dim <= head_dim or self.rotary_dim % 2:
            raise ModelError(f"rotary_dim = {self.rotary_dim}; expected an even number in 2..{head_dim}, the head size")
        self._check_widths("qkv", self.qkv, self.hidden_size, self.qkv_features)
        self._check_widths("gate_up", self.gate_up, self.hidden_size, (self.intermediate_size,) * 2)
        self._check_widths("attention_out", (self.attention_out,), self.query_features, (self.hidden_size,))
        self._check_widths("down", (self.down,), self.intermediate_size, (self.hidden_size,))
        q, k = self.q_norm, self.k_norm
        if (q is None) != (k is None):
            raise ModelError("q_norm and k_norm go together; only one of them was found")
        if q is not None and k is not None and (q.kind != "rms" or replace(k, path=q.path) != q):
            raise ModelError(f"q_norm and k_norm have to be RMS norms that are alike; got {q} and {k}")
        paths = [p.path for p in self.projections] + [n.path for n in self.norms]
        if len(set(paths)) < len(paths):
            raise ModelError(f"a module is named twice in a layer: {', '.join(sorted(paths))}")

    def _check_widths(self, name: str, parts: tuple[Projection, ...], inputs: int, outputs: tuple[int, ...]) -> None:
        given = tuple(p.out_features for p in parts)
        if given not in (outputs, (sum(outputs),)) or any(p.in_features != inputs for p in parts):
            described = ", ".join(f"{p.path}: {p.in_features} -> {p.out_features}" for p in parts) or "none"
            raise ModelError(
                f"{name}: the projections are {described}; the config asks for {inputs} -> "
                f"{' and '.join(map(str, outputs))}{f' or {sum(outputs)} in one' if len(outputs) > 1 else ''}"
            )

    @cached_property
    def query_features(self) -> int:
        """Heads times head size: what attention returns for a token."""
        return self.attention.num_heads * self.attention.head_dim

    @cached_property
    def qkv_features(self) -> tuple[int, int, int]:
        """Widths of q, k and v."""
        kv = self.attention.num_kv_heads * self.attention.head_dim
        return self.query_features, kv, kv

    @cached_property
    def projections(self) -> tuple[Projection, ...]:
        """All linear layers, in the order of the forward."""
        return (*self.qkv, self.attention_out, *self.gate_up, self.down)

    @cached_property
    def norms(self) -> tuple[NormSpec, ...]:
        """All norms that there are, in the order of the forward."""
        candidates = (
            self.input_norm, self.q_norm, self.k_norm, self.post_attention_norm, self.pre_mlp_norm, self.post_mlp_norm
        )  # fmt: skip
        return tuple(norm for norm in candidates if norm is not None)
