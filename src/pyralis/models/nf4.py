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
def dequantize_weight(layer: Any) -> torch.Tensor:
    """The weight [out, in] that a 4-bit layer stands for, in float32 on the CPU: exactly `code[index] * absmax`.

    bitsandbytes rounds it to the dtype that was quantised, so that is set to float32 for the call.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = layer.weight.quant_state
    kept, state.dtype = state.dtype, torch.float32
    try:
        return dequantize_4bit(layer.weight.data, state).cpu()
    finally:
        state.dtype = kept


def plain_layer(layer: Any, weight_OI: torch.Tensor) -> nn.Module:
    """The `nn.Linear` (GPT-2: `Conv1D`) in place of a 4-bit layer, with this weight and the layer's bias."""
    out_features, in_features = weight_OI.shape
    with torch.device("meta"):
        if getattr(layer, "source_cls", None) is Conv1D:
            plain: Any = Conv1D(out_features, in_features)
            weight_OI = weight_OI.t().contiguous()
        else:
            plain = nn.Linear(in_features, out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight_OI, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(weight_OI), requires_grad=False)
    return plain


def dequantize_model(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace every 4-bit layer of `model` by the ordinary layer it stands for, and forget that there was one."""
    for name, layer in list(four_bit_layers(model)):
        model.set_submodule(name, plain_layer(layer, dequantize_weight(layer).to(dtype)))
    if not hasattr(model.config, "quantization_config"):
        return
    del model.config.quantization_config
    # _weight_conversions would be undone on saving, and unpacking 4 bits cannot be; transformers makes it anew
    for name in ("hf_quantizer", "quantization_method", "_weight_conversions"):
        if name in model.__dict__:
            delattr(model, name)
    for name in ("is_loaded_in_4bit", "is_quantized"):
        setattr(model, name, False)
