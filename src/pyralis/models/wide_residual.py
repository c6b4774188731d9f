"""Residual streams that outgrow float16, whose largest number is 65,504.

Gemma's and Qwen's hidden states do, in some tokens and features, and stock makes a loss of NaN of it. Where such a
model computes in float16 (V100, T4) and all of its layers are fast, the stream between them is float32: products stay
in float16, a layer keeps 2 bytes more for each feature of its input and of the stream between attention and MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from pyralis.models.detect import family_of


def outgrows_float16(layer: nn.Module) -> bool:
    """Whether this is a decoder layer of a family whose hidden states are known to leave float16's range."""
    family = family_of(layer)
    return family is not None and family.outgrows_float16


def stream_dtype(layer: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Of the residual stream between fast layers, where embeddings come in `dtype`."""
    return torch.float32 if dtype == torch.float16 and outgrows_float16(layer) else dtype


def in_dtype(output: Any, dtype: torch.dtype) -> Any:
    """What a decoder returned, its last hidden states in `dtype`: the last norm has brought them back into range."""
    if isinstance(output, Tensor):
        return output.to(dtype)
    if isinstance(output, ModelOutput):
        output["last_hidden_state"] = output["last_hidden_state"].to(dtype)
        return output
    return (output[0].to(dtype), *output[1:])
