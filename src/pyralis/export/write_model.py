"""A model written as a standard folder, a shard at a time, from weights that come one layer after another."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from pyralis.errors import ModelError
from pyralis.export.merged_weights import merged_weights
from pyralis.models.nf4 import pack_weight
from pyralis.models.swap import stock_class

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def write_model(
    model: nn.Module,
    folder: Path,
    dtype: torch.dtype,
    *,
    max_shard_size: str | int = "5GB",
    four_bit: BitsAndBytesConfig | None = None,
    generation: GenerationConfig | None = None,
) -> None:
    """Write `model` with its active adapters merged: weights, config and generation config. The model stays as it is.

    Host memory holds one shard. The config says what is written: no quantisation unless `four_bit`, and whether head
    and embedding still are one.

    Args:
        four_bit: pack every linear layer but the head, as bitsandbytes does it while loading.
        generation: None is the model's own.

    Raises:
        ModelError: an adapter whose weights are not finite, or a size that is none.
    """
    limit = parse_size(max_shard_size)
    folder.mkdir(parents=True, exist_ok=True)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config: PreTrainedConfig = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    head = base.get_output_embeddings()
    names: set[str] = set()
    weights = _packed(merged_weights(model, dtype), base, head, four_bit, names)
    if _has_fused_experts(base):
        _write_whole(base, config, dict(weights), folder, limit)
    else:
        write_shards(weights, folder, limit)
    if f"{_path_of(base, head)}.weight" in names and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # training has made two weights of them
    config.dtype = dtype  # type: ignore[assignment]
    config.architectures = [stock_class(type(base)).__name__]
    if four_bit is not None:
        config.quantization_config = four_bit  # type: ignore[attr-defined]
    config.save_pretrained(folder)
    generation = generation or base.generation_config
    if generation is not None:
        generation.save_pretrained(folder)


def write_shards(weights: Iterable[tuple[str, Tensor]], folder: Path, limit: int) -> None:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` of at most `limit` bytes each and their index."""
    files: list[Path] = []
    weight_map: dict[str, int] = {}
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        files.append(folder / f"model-{len(files) + 1:05d}.safetensors")
        save_file(pending, files[-1], metadata={"format": "pt"})
        pending.clear()

    for name, tensor in weights:
        if pending and size + tensor.nbytes > limit:
            flush()
            size = 0
        pending[name] = tensor
        weight_map[name] = len(files)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))]
    for file, name in zip(files, names):
        file.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[at] for name, at in weight_map.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def parse_size(size: str | int) -> int:
    """Bytes of "5GB", "500MiB" or a number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)?\s*", str(size), re.IGNORECASE)
    if found is None or (bytes_ := int(float(found[1]) * _UNITS[(found[2] or "").upper()])) <= 0:
        raise ModelError(f'max_shard_size is {size!r}; expected a size such as "5GB" or "500MB".')
    return bytes_


def _packed(
    weights: Iterable[tuple[str, nn.Module, Mapping[str, Tensor]]],
    base: nn.Module,
    head: nn.Module | None,
    four_bit: BitsAndBytesConfig | None,
    names: set[str],
) -> Iterator[tuple[str, Tensor]]:
    """All weights by name, linear ones packed to 4 bits if that is wanted; `names` collects them."""
    head_path = _path_of(base, head)
    for path, plain, own in weights:
        for name, tensor in own.items():
            names.add(name)
            if four_bit is None or path == head_path or not _is_linear(plain) or not name.endswith(".weight"):
                yield name, tensor
                continue
            weight = tensor.t().contiguous() if isinstance(plain, Conv1D) else tensor
            for part, value in pack_weight(weight, four_bit).items():
                yield name + part, value


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _path_of(base: nn.Module, module: nn.Module | None) -> str | None:
    return next((name for name, found in base.named_modules() if found is module), None)


def _has_fused_experts(model: nn.Module) -> bool:
    """transformers keeps a mixture's experts as one weight and splits it on saving."""
    return any(weight.dim() == 3 and ".experts." in name for name, weight in model.named_parameters())


def _write_whole(
    base: nn.Module, config: PreTrainedConfig, weights: dict[str, Tensor], folder: Path, limit: int
) -> None:
    """By transformers, which knows how to split what it has fused; all weights are in host memory meanwhile."""
    with torch.device("meta"):
        skeleton: Any = stock_class(type(base))(config)
    skeleton.save_pretrained(folder, state_dict=weights, max_shard_size=limit)
