"""The weights of a model with its adapters merged, one layer at a time, while the model itself stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from pyralis.errors import ModelError
from pyralis.models.nf4 import dequantize_8bit, dequantize_weight, plain_layer


@torch.no_grad()
def merged_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
    """For each module that holds weights of its own: its path, itself as it would be without adapters and
    quantisation, and its weights by their full names: on the CPU, floating ones in `dtype`.

    The sum W + scale * B A is taken in float32 and rounded once. A weight that several modules share comes once. The
    adapters merged are the active ones; PEFT's own `merge_adapter` before is respected.

    Raises:
        ModelError: an adapter whose weights are not finite.
    """
    seen: set[int] = set()
    for path, module in _owners(model.get_base_model() if isinstance(model, PeftModel) else model, ""):
        plain = _plain(module, dtype)
        weights: dict[str, Tensor] = {}
        for name, tensor in _own_tensors(plain):
            if id(tensor) not in seen:
                # a plain module's parameters are the model's own, and may be met again: a tied head
                seen.update([id(tensor)] if plain is module else [])
                cast = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
                weights[f"{path}.{name}" if path else name] = cast.cpu().contiguous()
        if weights:
            yield path, plain, weights


def merge_layer(layer: Any, dtype: torch.dtype) -> nn.Module:
    """Merge a tuner layer's active adapters into its base layer, in place, and return that, its weights in `dtype`."""
    base = layer.get_base_layer()
    if type(base).__name__ in ("Linear4bit", "Linear8bitLt"):
        return _merge_quantized(layer, base, dtype)
    for name, parameter in list(base.named_parameters(recurse=False)):
        # a new Parameter: the head of a tied model must not change with the embedding
        setattr(base, name, nn.Parameter(parameter.detach().to(torch.float32, copy=True), requires_grad=False))
    layer.merge(safe_merge=True)
    for parameter in base.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    return base


def _merge_quantized(layer: Any, base: Any, dtype: torch.dtype) -> nn.Module:
    weight = _dequantized(base)
    layer.cpu()
    for name in layer.active_adapters:
        if name in layer.merged_adapters:
            continue
        if name in layer.lora_variant:  # DoRA
            weight = layer.lora_variant[name].merge_safe(layer, name, weight)
        else:
            weight += layer.get_delta_weight(name).float()
        if layer.lora_bias.get(name):
            base.bias = nn.Parameter(base.bias.cpu() + layer.lora_B[name].bias * layer.scaling[name])
        layer.merged_adapters.append(name)
    if not weight.isfinite().all():
        raise ValueError("in a quantised layer")
    layer.base_layer = plain_layer(base, weight.to(dtype))
    return layer.base_layer


def _owners(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold weights, by their path without PEFT's wrappers; a tuner layer counts as one."""
    if isinstance(module, ModulesToSaveWrapper):
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        yield from _owners(module.modules_to_save[active[0]] if active else module.original_module, path)
    elif isinstance(module, TrainableTokensWrapper):
        yield from _owners(module.token_adapter, path)
    elif isinstance(module, BaseTunerLayer):
        yield path, module
    else:
        yield path, module
        for name, child in module.named_children():
            yield from _owners(child, f"{path}.{name}" if path else name)


def _plain(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, BaseTunerLayer):
        try:
            return merge_layer(copy.deepcopy(module), dtype)
        except ValueError as error:  # PEFT's check for NaN and infinity
            raise ModelError(f"The adapter's weights are not all finite: {error}") from error
    if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
        return plain_layer(module, _dequantized(module).to(dtype))
    return module


def _dequantized(layer: Any) -> Tensor:
    """[out, in] in float32 on the CPU"""
    return dequantize_weight(layer) if type(layer).__name__ == "Linear4bit" else dequantize_8bit(layer)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    hidden = module._non_persistent_buffers_set
    yield from ((name, buffer) for name, buffer in module.named_buffers(recurse=False) if name not in hidden)
