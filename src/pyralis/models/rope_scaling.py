"""Rotary positions for sequences longer than a model was made for.

What is right depends on how the model's angles are made (`rope_parameters.rope_type`); ratio = wanted / model's length:

    default    linear scaling by the ratio: positions are interpolated (Chen et al., Extending Context Window of Large
               Language Models via Positional Interpolation, 2023), which a short fine-tuning adapts to
    linear     its factor times the ratio
    llama3     its factor times the ratio: only the low frequencies are interpolated, as the model has learnt it
    yarn       factor = wanted / original length, of which YaRN derives all else (Peng et al., YaRN, 2023)
    dynamic    nothing: it scales by itself once a sequence is longer
    longrope   nothing: its factors were searched for one length. The same holds for kinds not named here

Attention within a window sees distances up to the window alone, whatever the position: where all layers have one
(Mistral 7B v0.1), and in Gemma 3's layers that have one, angles stay as they are. Positions from a table (GPT-2) end.

All of it is in the config, so it is saved with the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pyralis.errors import ModelError
from pyralis.models.families import FAMILIES

WINDOWED = ("sliding_attention", "chunked_attention")
# Kinds that compute with `max_position_embeddings`: it has to stay what it is.
_BY_LENGTH = ("dynamic", "longrope")

RopeScaling = float | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RopeChange:
    """What became of a config's RoPE: note is for the user; scaled says whether angles are other ones now."""

    note: str
    scaled: bool


def scale_rope(
    config: PreTrainedConfig, max_seq_length: int | None, scaling: RopeScaling | None = None
) -> RopeChange | None:
    """Change `config` as `set_rope_scaling` does where a scaling is given, else as `extend_context` does.

    Returns None where nothing is to be done or said.
    """
    text = config.get_text_config(decoder=True)
    before = copy.deepcopy(getattr(text, "rope_parameters", None))
    if scaling is not None:
        note: str | None = set_rope_scaling(config, scaling, max_seq_length)
    else:
        note = None if max_seq_length is None else extend_context(config, max_seq_length)
    return None if note is None else RopeChange(note, getattr(text, "rope_parameters", None) != before)


def context_length(config: PreTrainedConfig) -> int | None:
    """The number of positions that a model was made for, its own scaling included; None if there is no limit."""
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    if not limit:
        return None
    lengths = [limit, getattr(text, "max_sequence_length", None) or 0]  # Vicuna 16k names its length there
    yarns = (own for own in _by_layer_type(text).values() if own.get("rope_type") == "yarn")
    lengths += [own["factor"] * own["original_max_position_embeddings"] for own in yarns]
    return int(max(lengths))


def extend_context(config: PreTrainedConfig, max_seq_length: int) -> str | None:
    """Change `config`, before a model is made of it, for sequences of up to `max_seq_length` tokens.

    Returns what was done or could not be done, for the user; None where the model reaches that far by itself.
    """
    text, limit = config.get_text_config(decoder=True), context_length(config)
    if limit is None or max_seq_length <= limit:
        return None
    parameters = _by_layer_type(text)
    if not parameters:
        return f"the model has {limit} positions and no rotary ones: sequences of {max_seq_length} tokens do not fit"
    kinds: dict[str | None, str] = {}
    for layer_type, own in parameters.items():
        if not _within_window(text, layer_type, limit):
            kinds[layer_type] = own.get("rope_type", "default")
    fixed = [kind for kind in kinds.values() if kind not in _STRETCHED]
    if "dynamic" in fixed:
        return f"RoPE scales dynamically beyond {limit} tokens, as the model has it"
    if fixed:
        return f"RoPE stays as it is ({fixed[0]}): the model was made for {limit} tokens and is unsure beyond"
    _replace(text, {t: _STRETCHED[kind](parameters[t], limit, max_seq_length) for t, kind in kinds.items()})
    text.max_position_embeddings = max_seq_length
    if not kinds:
        return f"RoPE needs no scaling for {max_seq_length} tokens: every layer attends within a window"
    how = " and ".join(f"{new['rope_type']} x {new['factor']:g}" for new in map(_by_layer_type(text).get, kinds) if new)
    return f"RoPE is scaled ({how}) for {max_seq_length} tokens; the model was made for {limit}"


def set_rope_scaling(config: PreTrainedConfig, scaling: RopeScaling, max_seq_length: int | None = None) -> str:
    """Change `config` to the scaling that a user names: a factor of linear scaling, or fields of `rope_parameters`.

    Raises:
        ModelError: fields that transformers refuses, or a model without rotary positions.
    """
    text, limit = config.get_text_config(decoder=True), context_length(config)
    given = {"rope_type": "linear", "factor": scaling} if isinstance(scaling, int | float) else dict(scaling)
    kind = given["rope_type"] = given.pop("type", None) or given.get("rope_type", "linear")
    factor = given.get("factor", 1.0)
    known = isinstance(kind, str) and kind in ROPE_INIT_FUNCTIONS
    if not known or not isinstance(factor, int | float) or factor <= 0:
        raise ModelError(
            f"rope_scaling is {scaling!r}; expected a positive factor, or a rope_type of "
            f"{', '.join(ROPE_INIT_FUNCTIONS)} with its fields, a positive factor among them."
        )
    parameters = _by_layer_type(text)
    if not parameters or limit is None:
        raise ModelError(f"rope_scaling is {scaling!r}, but this model ({text.model_type}) has no rotary positions.")
    kept = ("rope_theta", "partial_rotary_factor")
    _replace(
        text,
        {
            layer_type: {name: own[name] for name in kept if name in own} | given
            for layer_type, own in parameters.items()
            if not _within_window(text, layer_type, limit) or layer_type is None
        },
    )
    if kind not in _BY_LENGTH and max_seq_length:
        text.max_position_embeddings = max(limit, max_seq_length)
    try:
        text.standardize_rope_params()
        text.validate_rope()
    except (KeyError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"rope_scaling is {scaling!r}, which transformers refuses: {error}") from error
    return f"RoPE is scaled as given: {kind}" + (f" x {given['factor']}" if "factor" in given else "")


def _by_layer_type(text: Any) -> dict[str | None, dict[str, Any]]:
    """`rope_parameters` by layer type; under None where one holds for all layers."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    if nested:
        return dict(nested)
    return {None: parameters} if parameters else {}


def _replace(text: Any, changed: Mapping[str | None, dict[str, Any]]) -> None:
    if None in changed:
        text.rope_parameters = changed[None]
    elif changed:
        text.rope_parameters = {**text.rope_parameters, **changed}


def _within_window(text: Any, layer_type: str | None, limit: int) -> bool:
    """Whether the layers of this type (None: all) attend within a window of lengths that the model has seen."""
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    if not window or window > limit:
        return False
    if layer_type is not None:
        return layer_type in WINDOWED
    if (types := getattr(text, "layer_types", None)) is not None:
        return all(each in WINDOWED for each in types)
    return any(family.module == text.model_type and family.windows == "config" for family in FAMILIES)


_STRETCHED: dict[str, Any] = {
    "default": lambda own, limit, wanted: {**own, "rope_type": "linear", "factor": wanted / limit},
    "linear": lambda own, limit, wanted: {**own, "factor": own["factor"] * wanted / limit},
    "llama3": lambda own, limit, wanted: {**own, "factor": own["factor"] * wanted / limit},
    "yarn": lambda own, limit, wanted: {**own, "factor": wanted / own["original_max_position_embeddings"]},
}
