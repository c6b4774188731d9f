"""A chat session from a folder: an adapter, a merged or a whole model, or a base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyralis.data.template import load_template, resolve_template
from pyralis.lora.adapter import load_adapter
from pyralis.lora.record import read_record
from pyralis.models.dtype import DtypeName
from pyralis.models.load import ModelSettings, load_model, load_tokenizer
from pyralis.models.source import locate_model
from pyralis.serve.chat import ChatSession


@dataclass(frozen=True, slots=True)
class ChatModelSettings:
    """What to chat with.

    Attributes:
        model: an adapter's or model's folder, a demo model's name or a hub name.
        base: for an adapter, the base model to take instead of the one it names.
        load_in_4bit: None is as the adapter was trained; a whole model is loaded as it is stored.
        template_name: one of the named chat templates; "" is the one saved with the model.
        system: the system text; None is the template's default.
    """

    model: str
    base: str | None = None
    load_in_4bit: bool | None = None
    dtype: DtypeName = "auto"
    template_name: str = ""
    system: str | None = None
    trust_remote_code: bool = False


def load_chat(settings: ChatModelSettings, *, notice: Callable[[str], None] = lambda line: None) -> ChatSession:
    """Load the model, its adapter, tokenizer and chat template.

    Args:
        notice: is told what was chosen while loading, and later what the session has to say.

    Raises:
        ModelError, TemplateError, FetchError: see `load_model`, `load_adapter` and `load_template`.
    """
    source = locate_model(settings.model, base=settings.base)
    folder = source.adapter or Path(source.path)
    # tokenizer and template first: what is wrong with them is found before a model is loaded
    tokenizer = load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code, base=settings.base)
    if settings.template_name:
        template = resolve_template(settings.template_name, tokenizer)
    else:
        template = load_template(folder, tokenizer)

    record = read_record(folder)
    trained_in_4bit = record.quantized and source.adapter is not None
    four_bit = trained_in_4bit if settings.load_in_4bit is None else settings.load_in_4bit
    loaded = load_model(
        ModelSettings(
            settings.model,
            train_mode="qlora" if four_bit else "lora",
            dtype=settings.dtype,
            quant_type=record.quant_type,
            double_quant=record.double_quant,
            trust_remote_code=settings.trust_remote_code,
            base=settings.base,
            max_seq_length=record.rope_scaled_to,
            rope_scaling=record.rope_scaling,
        )
    )
    model: Any = loaded.model
    if source.adapter is not None:
        model = load_adapter(loaded.model, source.adapter)
    for note in loaded.notes:
        notice(note)
    return ChatSession(model.eval(), tokenizer, template, system=settings.system, notice=notice)
