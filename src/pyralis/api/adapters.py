"""`FastLanguageModel.get_peft_model`: LoRA onto a loaded model, by PEFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel

from pyralis.api.modes import check_choice, offload_embedding, set_checkpointing
from pyralis.api.notice import notice
from pyralis.api.origin import Checkpointing, base_of, origin_of
from pyralis.api.saving import bind_methods
from pyralis.errors import ModelError
from pyralis.lora.attach import LoraSettings, attach_lora, count_parameters
from pyralis.lora.changed_base import changes_base, keep_start
from pyralis.models.float16_range import float16_warning
from pyralis.models.surgery import accelerate, report
from pyralis.models.swap import fast_modules

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# One product of which some families make several projections (Phi-3).
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_FUSED |= {"up_proj": "gate_up_proj"}
# Fields of `LoraConfig` that follow from the model.
_SETTLED = ("task_type", "fan_in_fan_out", "inference_mode")
# Named among the targets these are trained whole.
_WHOLE = ("embed_tokens", "lm_head")


def attach(
    model: Any,
    *,
    rank: int,
    target_modules: str | Sequence[str] | None,
    alpha: float,
    dropout: float,
    bias: Literal["none", "all", "lora_only"],
    layers_to_transform: int | Sequence[int] | None,
    layers_pattern: str | Sequence[str] | None,
    checkpointing: Checkpointing,
    random_state: int,
    use_rslora: bool,
    use_dora: bool,
    modules_to_save: Sequence[str] | None,
    init_lora_weights: bool | str,
    loftq_config: Any,
    more: Mapping[str, Any],
) -> Any:
    """See `FastLanguageModel.get_peft_model`."""
    check_choice(checkpointing)  # before the model is changed
    if origin_of(model).mode == "full":
        notice("get_peft_model has no effect: the model was loaded with full_finetuning, which trains all weights")
        set_checkpointing(model, checkpointing)
        return model
    if isinstance(model, PeftModel):
        _check_same(model, rank, alpha)
        set_checkpointing(model, checkpointing)
        return model
    targets, whole = _targets(model, target_modules, modules_to_save)
    options = _options(layers_to_transform, layers_pattern, init_lora_weights, loftq_config, more)
    settings = LoraSettings(
        rank, alpha, dropout, targets, bias, use_rslora, use_dora, init_lora_weights, whole,
        may_change_base=True, more=options,
    )  # fmt: skip
    if not any(fast_modules(model)):
        accelerate(model)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(random_state)
        tuned = attach_lora(model, settings)
    if (name := origin_of(model).name) is not None:
        tuned.peft_config["default"].base_model_name_or_path = name
    if changes_base(init_lora_weights):
        keep_start(tuned)
        if str(init_lora_weights).startswith("loftq"):
            notice("LoftQ has rounded the base weights: save the merged model, an adapter alone would not fit its base")
    bind_methods(tuned)
    offload_embedding(tuned)
    set_checkpointing(tuned, checkpointing)
    _summarise(tuned)
    return tuned


def _targets(
    model: Any, target_modules: str | Sequence[str] | None, modules_to_save: Sequence[str] | None
) -> tuple[str | tuple[str, ...], tuple[str, ...]]:
    """(what gets LoRA, what is trained whole), by the names that this model has."""
    whole = list(modules_to_save or ())
    if isinstance(target_modules, str):
        return target_modules, tuple(whole)
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    default = target_modules is None
    targets: dict[str, None] = {}
    for name in (*ATTENTION, *MLP) if target_modules is None else target_modules:
        fused = _FUSED.get(name)
        if name in _WHOLE and name not in whole:
            notice(f"{name} is among target_modules: it is trained whole, as if modules_to_save named it")
            whole.append(name)
        elif name not in _WHOLE:
            targets[fused if fused is not None and name not in ends and fused in ends else name] = None
    if default and not ends.issuperset(targets):
        return "all-linear", tuple(whole)
    return tuple(targets), tuple(whole)


def _options(
    layers_to_transform: int | Sequence[int] | None,
    layers_pattern: str | Sequence[str] | None,
    init_lora_weights: bool | str,
    loftq_config: Any,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """What `LoraConfig` takes besides `LoraSettings`' own fields."""
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    more = {name: value for name, value in more.items() if name not in _SETTLED}
    for name in more:
        if name not in known:
            near = get_close_matches(name, [*known, "lora_alpha", "target_modules"], n=1)
            raise ModelError(
                f"get_peft_model has no parameter {name!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
            )
    options: dict[str, Any] = dict(more)
    if layers_to_transform is not None:
        single = isinstance(layers_to_transform, int)
        options["layers_to_transform"] = layers_to_transform if single else list(layers_to_transform)  # type: ignore
    if layers_pattern is not None:
        options["layers_pattern"] = layers_pattern
    if init_lora_weights == "loftq":
        given = loftq_config if isinstance(loftq_config, Mapping) else vars(loftq_config or object)
        fields = {name: given[name] for name in ("loftq_bits", "loftq_iter") if name in given}
        options["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 1} | fields
    elif loftq_config:
        notice("loftq_config has no effect: init_lora_weights is not 'loftq'")
    return options


def _check_same(model: PeftModel, rank: int, alpha: float) -> None:
    """An adapter that was loaded is trained further, with its own settings."""
    config: Any = model.peft_config[model.active_adapter]
    if (config.r, config.lora_alpha) != (rank, alpha):
        raise ModelError(
            f"the model has an adapter of rank {config.r} and lora_alpha {config.lora_alpha} already, and "
            f"get_peft_model asks for rank {rank} and lora_alpha {alpha}. To train that adapter further leave this "
            "call out; for a new one load the base model, or the adapter merged."
        )
    notice("the model has its adapter already: that is trained further")


def _summarise(model: PeftModel) -> None:
    count = count_parameters(model)
    state = report(base_of(model)) if any(fast_modules(model)) else None
    layers = "all layers stock" if state is None else "; ".join(state.lines)
    if (warning := float16_warning(base_of(model), 0 if state is None else state.fast_layers)) is not None:
        notice(warning)
    notice(f"{count.trainable:,} of {count.total:,} parameters are trained ({100 * count.share:.2f} %); {layers}")
