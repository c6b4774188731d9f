"""A saved adapter onto the base model it was trained on, checked to fit."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from pyralis.errors import ModelError
from pyralis.lora.record import read_record
from pyralis.models.files import read_json

WEIGHTS = "adapter_model.safetensors"


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Put the LoRA adapter in `folder` on `model`, in place.

    Raises:
        ModelError: no adapter there, one of another method than LoRA, pickled or damaged weights, or weights that do
            not fit `model` in name or shape (PEFT itself only warns where names differ); an adapter that is recorded
            to be of another architecture, which may have the same names and shapes.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} has no adapter_config.json; expected an adapter's folder.")
    method = read_json(folder / "adapter_config.json").get("peft_type")
    if method != "LORA":
        raise ModelError(f"{folder} holds an adapter of type {method}; only LORA is supported.")
    saved = _saved_names(folder)
    trained_on, given = read_record(folder).model_type, model.config.model_type
    if trained_on not in (None, given):
        raise ModelError(
            f"The adapter {folder} does not fit the base model {model.name_or_path}: it was trained on a {trained_on} "
            f"model, and this is a {given} model. Give the model that it was trained on."
        )
    try:
        config = LoraConfig.from_pretrained(str(folder))
        if config.init_lora_weights == "orthogonal":
            config.init_lora_weights = True  # PEFT's own start, of no use here, fails on 4-bit layers
        tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)
    except Exception as error:  # a config with odd values makes PEFT raise anything
        reason = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error))
        raise ModelError(f"The adapter {folder} does not fit the base model {model.name_or_path}: {reason}") from error
    wanted = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    # an adapter of the embedding is saved with the embedding itself, which PEFT has put in its place
    unused = sorted(name for name in saved - wanted if ".base_layer." not in name)
    missing = sorted(wanted - saved)
    if missing or unused:
        what = f"it lacks {missing[0]}" if missing else f"the model has no place for {unused[0]}"
        raise ModelError(
            f"The adapter {folder} does not fit the base model {model.name_or_path}: {what} "
            f"({len(missing)} missing, {len(unused)} unused weights)."
        )
    return tuned


def _saved_names(folder: Path) -> set[str]:
    file = folder / WEIGHTS
    if not file.is_file():
        raise ModelError(f"{folder} has no {WEIGHTS}: pickled or missing adapter weights are not read.")
    try:
        with safe_open(file, framework="pt") as weights:
            return set(weights.keys())
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged or was not copied wholly ({error}).") from error
