"""What an attention layer computes and how its tokens lie.

Shapes: T tokens = B rows of S tokens, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyralis.errors import ModelError


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """softmax(cap(scale * q k^T)) v, where cap(s) = softcap * tanh(s / softcap)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    causal: bool = True
    window: int | None = None  # query i sees key j only if i - j < window, as in transformers' sliding_window
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads = {self.num_heads} is not a multiple of num_key_value_heads = "
                f"{self.num_kv_heads}; correct the model's config.json"
            )
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ModelError(
                f"sliding_window = {self.window} with causal = {self.causal}: a window is at least 1 token of causal "
                "attention; set sliding_window to null in the model's config.json for full attention"
            )
        if self.softcap is not None and self.softcap <= 0:
            raise ModelError(f"attn_logit_softcapping = {self.softcap}: expected a positive number, or null for none")

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads

    def within(self, max_seqlen: int) -> AttentionSpec:
        """The same function of sequences up to `max_seqlen`: a window that wide is none."""
        return replace(self, window=None) if self.window is not None and self.window >= max_seqlen else self


@dataclass(frozen=True, slots=True, eq=False)
class SharedKeys:
    """Keys and values of one token stand in two sequences: two answers to one prompt, which is computed once.

    The queries of a sequence are its last tokens. So of prompt p with answers a and b, tokens p a b: the queries p a
    see the keys p a, and the queries b see the keys p b. K key rows stand for T tokens.
    """

    cu_seqlens: Tensor  # [sequences + 1] int32: where each sequence's keys end
    rows: Tensor  # [K] int64: the token of each key
    first: Tensor  # [T] int64: the key that is a token's first
    again: Tensor  # [2, E] int64: tokens that stand a second time, and their second keys

    def spread(self, t: Tensor) -> Tensor:
        """[K, ...] of [T, ...]"""
        return t.index_select(0, self.rows)

    def gathered(self, grad: Tensor) -> Tensor:
        """[T, ...]: the gradient of `spread`. No atomics: a sum has two terms, in one order."""
        total = grad.index_select(0, self.first)
        tokens, keys = self.again.unbind()
        return total.index_copy_(0, tokens, total.index_select(0, tokens) + grad.index_select(0, keys))


@dataclass(frozen=True, slots=True, eq=False)
class AttentionLayout:
    """How the T = batch * seq rows of q, k and v form sequences. Make one with the methods below."""

    batch: int
    seq: int
    max_seqlen: int
    cu_seqlens: Tensor | None = None  # [sequences + 1] int32 on the device of q; sequences may be empty
    shared: SharedKeys | None = None
    lengths: tuple[int, ...] | None = None  # of padded rows: how many tokens of each are real, if the host knows

    @classmethod
    def padded(cls, batch: int, seq: int, lengths: tuple[int, ...] | None = None) -> AttentionLayout:
        """Rows of equal length, full or padded on the right: under causal attention no real token sees the padding."""
        return cls(batch, seq, seq, lengths=lengths)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> AttentionLayout:
        """Sequences one after another. cu_seqlens: their ends, from 0 to `tokens`, int32.

        max_seqlen bounds the longest; it is given because reading it from the device would wait for it. A captured
        graph keeps it, and the number of sequences: fill cu_seqlens up with `tokens`.
        """
        assert (cu_seqlens.dtype, cu_seqlens.dim()) == (torch.int32, 1), "cu_seqlens: [sequences + 1] int32"
        return cls(1, tokens, min(max_seqlen, tokens), cu_seqlens)

    @classmethod
    def shared_prompts(cls, cu_seqlens: Tensor, keys: SharedKeys, max_seqlen: int, tokens: int) -> AttentionLayout:
        """As `packed`, with keys of their own; max_seqlen bounds the keys of a sequence."""
        return replace(cls.packed(cu_seqlens, max_seqlen, tokens), max_seqlen=max_seqlen, shared=keys)

    @classmethod
    def left_padded(cls, starts: Tensor, seq: int, lengths: tuple[int, ...] | None = None) -> AttentionLayout:
        """Rows of `seq` tokens whose first starts[b] are padding. starts: [B] on the device of q; nothing waits for it.

        The padding of a row becomes a sequence of its own: its outputs are finite and mean nothing, and no real token's
        output or gradient depends on it.
        """
        first = torch.arange(0, starts.numel() * seq, seq, dtype=torch.int32, device=starts.device)
        cu_seqlens = torch.empty(2 * starts.numel() + 1, dtype=torch.int32, device=starts.device)
        cu_seqlens[:-1:2] = first
        cu_seqlens[1::2] = first + starts.to(torch.int32)
        cu_seqlens[-1:].fill_(starts.numel() * seq)
        return cls(1, starts.numel() * seq, seq, cu_seqlens, lengths=lengths)

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def key_cu_seqlens(self) -> Tensor | None:
        return self.cu_seqlens if self.shared is None else self.shared.cu_seqlens

    def documents(self) -> Tensor:
        """[T] number of the sequence that each token of a packed layout is in."""
        assert self.cu_seqlens is not None
        return _sequence_of(self.cu_seqlens, self.tokens)

    def key_documents(self) -> Tensor:
        """[T], or [K] of shared keys: the number of the sequence that each key is in."""
        return self.documents() if self.shared is None else _sequence_of(self.shared.cu_seqlens, len(self.shared.rows))


def _sequence_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    position = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], position, right=True)
