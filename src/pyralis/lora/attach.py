"""LoRA onto a model, by PEFT: on every linear layer but the head unless told otherwise."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pyralis.errors import ModelError
from pyralis.lora.adapter import load_adapter
from pyralis.lora.changed_base import changes_base
from pyralis.lora.detach import undone_on_error
from pyralis.lora.orthogonal import start_orthogonally
from pyralis.models.nf4 import four_bit_layers

__all__ = ["LoraSettings", "ParameterCount", "attach_lora", "count_parameters", "find_linear_targets"]

logger = logging.getLogger(__name__)

InitLora: TypeAlias = bool | str
# PEFT's other initialisations (pissa, olora, loftq, corda ...) change the base weights, so that the saved adapter is
# wrong on the base model it names.
INITIALISATIONS: tuple[InitLora, ...] = (True, False, "gaussian", "orthogonal")
HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """A low-rank adapter: W + scale * B A, with scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    Attributes:
        target_modules: "all-linear" (every linear layer but the head), the names of modules, or a regular expression
            that whole paths match.
        modules_to_save: modules trained whole and saved with the adapter, such as "embed_tokens".
        init_lora_weights: True starts from B = 0; others as PEFT has them.
        may_change_base: take starts that change the base weights too (`changed_base.py`).
        more: other fields of PEFT's `LoraConfig`.

    Raises:
        ModelError: a number or word that none of these can be.
    """

    rank: int = 64
    alpha: float = 16
    dropout: float = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: InitLora = True
    modules_to_save: tuple[str, ...] = ()
    may_change_base: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rank, alpha, dropout = self.rank, self.alpha, self.dropout
        for name, value, fits, expected in (
            ("r (lora_rank)", rank, isinstance(rank, Integral) and rank >= 1, "a whole number, at least 1"),
            ("lora_alpha", alpha, isinstance(alpha, Real), "a number"),
            ("lora_dropout", dropout, isinstance(dropout, Real) and 0 <= dropout < 1, "a number from 0 to below 1"),
            ("bias (lora_bias)", self.bias, self.bias in ("none", "all", "lora_only"), "none, all or lora_only"),
        ):
            if not fits:
                raise ModelError(f"{name} is {value!r}; expected {expected}.")


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Numbers of weights; tied ones count once, 4-bit ones as the weights they stand for."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total if self.total else 0.0


def attach_lora(model: PreTrainedModel, settings: LoraSettings, *, adapter: Path | None = None) -> PeftModel:
    """Freeze `model` and put a trainable adapter on it.

    Whatever is trained is float32, also on a half-precision base: small updates are kept, and float16 gradients can be
    scaled. So a half-precision model with `modules_to_save` or `bias` runs its forward under autocast, as the trainer
    does. Embeddings and head stay in the dtype they have.

    Args:
        adapter: continue training the adapter in this folder. Its own rank, alpha and targets then hold.

    Raises:
        ModelError: names that match nothing, an initialisation that would change the base, an adapter of another model.
    """
    if adapter is not None:
        tuned = load_adapter(model, adapter, trainable=True)
    else:
        with undone_on_error(model):
            tuned = _attach_new(model, settings)
    for parameter in tuned.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    return tuned


def _attach_new(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    targets = _check_names(model, settings)
    _warn_of_fused_experts(model)
    modules = dict(model.named_modules())
    by_us = settings.init_lora_weights == "orthogonal" and bool(four_bit_layers(model))
    try:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides it, so a float is as good
            lora_dropout=settings.dropout,
            target_modules=targets,
            bias=settings.bias,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            # what PEFT would do again, and fail at, wherever the saved adapter is loaded
            init_lora_weights=by_us or settings.init_lora_weights,  # type: ignore[arg-type]
            modules_to_save=list(settings.modules_to_save) or None,
            fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in _matching(modules, targets)),
            **settings.more,
        )
        tuned = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ModelError(f"LoRA cannot be put on this model: {error}") from error
    _check_variant(tuned, config)  # type: ignore[arg-type]
    if by_us:
        start_orthogonally(tuned)  # type: ignore[arg-type]
    return tuned  # type: ignore[return-value]


def find_linear_targets(model: nn.Module) -> list[str]:
    """The names of all linear layers but the head, for `target_modules`.

    Last parts of names ("q_proj") where they say it, full names where a last part is a number or is also the head's.
    Finds `nn.Linear`, bitsandbytes' and other quantised linear layers, and GPT-2's `Conv1D`.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    heads = {name for name, module in linear.items() if module is head or name.rpartition(".")[2] in HEAD_NAMES}
    head_ends = {name.rpartition(".")[2] for name in heads}
    targets = set()
    for name in linear.keys() - heads:
        end = name.rpartition(".")[2]
        targets.add(name if end in head_ends or end.isdigit() else end)
    return sorted(targets)


def count_parameters(model: nn.Module) -> ParameterCount:
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
        total += count
        trainable += count if parameter.requires_grad else 0
    return ParameterCount(trainable, total)


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    is_leaf = next(module.children(), None) is None
    return is_leaf and "Linear" in type(module).__name__ and (hasattr(module, "qweight") or hasattr(module, "weight"))


def _matching(names: dict[str, nn.Module], targets: list[str] | str) -> list[str]:
    """The module names that PEFT's rule picks: equal to a target, or ending with "." + target; or by an expression."""
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    return [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]


def _check_names(model: PreTrainedModel, settings: LoraSettings) -> list[str] | str:
    if settings.may_change_base:
        _check_start(model, settings.init_lora_weights)
    elif settings.init_lora_weights not in INITIALISATIONS:
        raise ModelError(
            f"init_lora_weights is {settings.init_lora_weights!r}; expected one of true, false, gaussian, orthogonal. "
            "Others change the base model's weights, and the adapter would be wrong on the base model it names."
        )
    modules = {name: module for name, module in model.named_modules() if name}
    candidates = find_linear_targets(model)
    if not candidates:
        raise ModelError(f"{type(model).__name__} has no linear layers to put LoRA on.")
    wanted = settings.target_modules
    targets = candidates if wanted == "all-linear" else wanted if isinstance(wanted, str) else list(wanted)
    for target in [targets] if isinstance(targets, str) else [[name] for name in targets]:
        if not _matching(modules, target):
            name = target if isinstance(target, str) else target[0]
            raise ModelError(
                f"lora_target_modules names {name!r}, which {type(model).__name__} does not have; its linear layers: "
                f"{', '.join(candidates[:20])}."
            )
    packed = dict(four_bit_layers(model))
    for name in settings.modules_to_save:
        if not _matching(modules, [name]):
            raise ModelError(
                f"modules_to_save names {name!r}, which {type(model).__name__} does not have; it has, among others: "
                f"{', '.join(sorted({key.rpartition('.')[2] for key in modules} - {''}, key=str.isdigit)[:20])}."
            )
        if _matching(packed, [name]):
            raise ModelError(
                f"modules_to_save names {name!r}, which is in 4 bits and cannot be trained whole: use lora."
            )
    return targets


def _check_variant(model: PeftModel, config: LoraConfig) -> None:
    """PEFT passes over some variants of LoRA on quantised layers without a word."""
    wanted = [f.name for f in fields(config) if f.metadata.get("is_lora_variant") and getattr(config, f.name)]
    if wanted and not any(getattr(module, "lora_variant", None) for module in model.modules()):
        raise ModelError(
            f"{' and '.join(wanted)} would have no effect: PEFT does not have it for the layers of this model. Load "
            "the model without quantisation, or leave it out."
        )


def _check_start(model: nn.Module, start: InitLora) -> None:
    if start == "loftq" and find_spec("scipy") is None:
        raise ModelError("init_lora_weights is 'loftq', for which PEFT needs the package scipy: pip install scipy")
    quantised = ("Linear4bit", "Linear8bitLt")
    if changes_base(start) and any(type(module).__name__ in quantised for module in model.modules()):
        raise ModelError(
            f"init_lora_weights is {start!r}, which takes its start out of the base weights; these are quantised, and "
            "what they are rounded to would not be what the adapter was made for. Load the model without quantisation "
            "(load_in_4bit=False), or use init_lora_weights=True."
        )


def _warn_of_fused_experts(model: nn.Module) -> None:
    """transformers 5 keeps a mixture's experts as one 3-D weight, which is no linear layer."""
    fused = [name for name, weight in model.named_parameters() if weight.dim() == 3 and ".experts." in name]
    if fused:
        logger.warning("LoRA is on no expert of this mixture: %d fused weights such as %s", len(fused), fused[0])
