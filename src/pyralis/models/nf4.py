"""bitsandbytes' 4-bit layers: settled after loading, and turned back into ordinary layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def is_four_bit(model: nn.Module) -> bool:
    return any(True for _ in four_bit_layers(model))


def four_bit_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The 4-bit linear layers by name."""
    return ((name, module) for name, module in model.named_modules() if type(module).__name__ == "Linear4bit")


def settle_four_bit(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Set the compute dtype of every 4-bit layer, and keep its weight in the layout that it was quantised in.

    On a CPU with AVX512-BF16 bitsandbytes would repack a weight in place at the first forward in eval mode: it rounds
    absmax to bfloat16, computes in bfloat16, and the layer cannot be trained after it.
    """
    for _, layer in four_bit_layers(model):
        layer.compute_dtype = compute_dtype
        layer.compute_type_is_set = True
        layer.support_avx512bf16_for_cpu = False


@torch.no_grad()
def dequantize_layer(layer: Any) -> nn.Module:
    """The `nn.Linear` (or GPT-2's `Conv1D`) with the weights that a 4-bit layer stands for, in float32 on the CPU.

    Its weights are exactly `code[index] * absmax`: bitsandbytes rounds to the dtype that was quantised, so that is set
    to float32 for the call.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = layer.weight.quant_state
    kept, state.dtype = state.dtype, torch.float32
    try:
        weight_OI = dequantize_4bit(layer.weight.data, state).cpu()
    finally:
        state.dtype = kept
    bias = None if layer.bias is None else layer.bias.detach().float().cpu()
    out_features, in_features = weight_OI.shape
    with torch.device("meta"):
        if getattr(layer, "source_cls", None) is Conv1D:
            plain: Any = Conv1D(out_features, in_features)
            weight_OI = weight_OI.t().contiguous()
        else:
            plain = nn.Linear(in_features, out_features, bias=bias is not None)
    plain.weight = nn.Parameter(weight_OI, requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return plain


def dequantize_model(model: PreTrainedModel) -> None:
    """Replace every 4-bit layer of `model` by the ordinary layer it stands for, and forget that there was one."""
    for name, layer in list(four_bit_layers(model)):
        model.set_submodule(name, dequantize_layer(layer))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "_quantization_method", "_pre_quantization_dtype"):
        if name in model.__dict__:
            delattr(model, name)
    for name in ("is_loaded_in_4bit", "is_quantized"):
        setattr(model, name, False)
