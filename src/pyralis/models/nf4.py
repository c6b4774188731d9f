"""bitsandbytes' layers: settled after loading, turned back into ordinary ones, and packed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pyralis.models.dtype import choose_device


def is_four_bit(model: nn.Module) -> bool:
    return any(True for _ in four_bit_layers(model))


def four_bit_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The 4-bit linear layers by name."""
    return ((name, module) for name, module in model.named_modules() if type(module).__name__ == "Linear4bit")


def settle_four_bit(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Set the compute dtype of every 4-bit layer, and keep its weight in the layout that it was quantised in.

    A checkpoint that is in 4 bits says which dtype it was quantised from; bitsandbytes would round weights to that
    before the compute dtype.

    On a CPU with AVX512-BF16 bitsandbytes would repack a weight in place at the first forward in eval mode: it rounds
    absmax to bfloat16, computes in bfloat16, and the layer cannot be trained after it.
    """
    for _, layer in four_bit_layers(model):
        layer.compute_dtype = compute_dtype
        layer.compute_type_is_set = True
        layer.support_avx512bf16_for_cpu = False
        if (state := getattr(layer.weight, "quant_state", None)) is not None:
            state.dtype = compute_dtype


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


@torch.no_grad()
def dequantize_8bit(layer: Any) -> torch.Tensor:
    """The weight [out, in] that bitsandbytes' 8-bit layer stands for, float32 on the CPU: code * row maximum / 127."""
    weight, state = layer.weight, layer.state
    codes = weight.data if weight.CB is None else weight.CB
    maxima = state.SCB if weight.SCB is None else weight.SCB
    return codes.cpu().float() * (maxima.cpu().float()[:, None] / 127)


@torch.no_grad()
def pack_weight(weight_OI: torch.Tensor, config: BitsAndBytesConfig) -> dict[str, torch.Tensor]:
    """A weight in 4 bits as a checkpoint holds it: by what is put behind its name, all on the CPU."""
    from bitsandbytes.functional import quantize_4bit

    device = choose_device()
    packed, state = quantize_4bit(
        weight_OI.to(device),
        blocksize=64,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
    )
    return {"": packed.cpu(), **{f".{name}": part.cpu() for name, part in state.as_dict(packed=True).items()}}


def plain_layer(layer: Any, weight_OI: torch.Tensor) -> nn.Module:
    """The `nn.Linear` (GPT-2: `Conv1D`) in place of a quantised layer, with this weight and the layer's bias."""
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
